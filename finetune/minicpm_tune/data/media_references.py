"""Which image or video every placeholder of a row stands for.

A row names its media in ``image``, ``images``, ``video`` or ``videos``:

- a single image is meant by every ``<image>`` in the row;
- in a list, the first ``<image>`` (or ``<ImageHere>``) means the first image, and so on; ``<image_02>`` the
  third;
- in a dictionary, the placeholders are the keys, and may stand anywhere and more than once.

What no placeholder mentions is put in front of the first user turn, in the order of the row, each followed by
a newline (by nothing for InternLM-XComposer2). A placeholder without an image is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from minicpm_tune.data.turns import Turn
from minicpm_tune.errors import RowError

MARKS = re.compile(r"<image>|<image_\d+>|<ImageHere>|<video>")
_FILMS = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg")
_NOTHING: tuple[Any, ...] = (None, "", [], {})


@dataclass(frozen=True)
class Source:
    """Where an image or a video comes from.

    Attributes:
        kind: ``image`` or ``video``.
        value: A path, URL, data URI, bytes, or ``{"bytes":, "path":}``; a video may be a list of these.
    """

    kind: str
    value: Any


class MediaReader:
    """Gives every placeholder of a row its image or video."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.named: dict[str, Any] = {}
        self.single: Any = None
        self.listed: dict[str, list[Any]] = {"image": [], "video": []}
        self.taken: dict[str, int] = {"image": 0, "video": 0}
        self.mentioned: set[str] = set()
        for kind in ("image", "video"):
            one: Any = row.get(kind)
            several: Any = row.get(f"{kind}s")
            if one not in _NOTHING and several not in _NOTHING:
                raise RowError(
                    "media", f"the row has both {kind!r} and '{kind}s', expected one. Remove one of them."
                )
            if kind == "image":
                self._add_images(several if one in _NOTHING else one)
            elif one not in _NOTHING:
                self.listed["video"] = list(one) if _are_films(one) else [one]
            elif several not in _NOTHING:
                self.listed["video"] = list(several) if isinstance(several, (list, tuple)) else [several]

    def _add_images(self, value: Any) -> None:
        if value in _NOTHING:
            return
        if isinstance(value, Mapping) and not {"bytes", "path"} & set(value):
            present = {
                str(key): image for key, image in value.items() if image is not None
            }  # Parquet fills in None
            wrong = [key for key in present if not re.fullmatch(r"<image_\d+>|<image>|<ImageHere>", key)]
            if wrong:
                raise RowError(
                    "media",
                    f"'image' has the key {wrong[0]!r}, expected keys like '<image_00>'. Write the "
                    "placeholder as key.",
                )
            self.named = present
        elif isinstance(value, (list, tuple)):
            self.listed["image"] = list(value)
        else:
            self.single = value

    def take(self, mark: str, number: int) -> Source:
        """The source that a placeholder in turn ``number`` stands for."""
        if mark == "<video>":
            return Source("video", self._next("video", mark, number))
        if self.named:
            if mark not in self.named:
                raise RowError(
                    "placeholder",
                    f"turn {number} mentions {mark}, but the row's images are {listed(self.named)}. "
                    "Add the image or remove the placeholder.",
                )
            self.mentioned.add(mark)
            return Source("image", self.named[mark])
        if self.single is not None and mark in ("<image>", "<ImageHere>", "<image_00>", "<image_0>"):
            self.mentioned.add("single")
            return Source("image", self.single)
        if mark.startswith("<image_"):
            return self._numbered(mark, number)
        return Source("image", self._next("image", mark, number))

    def _numbered(self, mark: str, number: int) -> Source:
        index = int(mark[len("<image_") : -1])
        images = self.listed["image"]
        if index >= len(images):
            raise RowError(
                "placeholder",
                f"turn {number} mentions {mark}, but the row has {_count(len(images), 'image')}, counted "
                "from 0. "
                "Add the image or remove the placeholder.",
            )
        self.mentioned.add(f"image#{index}")
        return Source("image", images[index])

    def _next(self, kind: str, mark: str, number: int) -> Any:
        index = self.taken[kind]
        if index >= len(self.listed[kind]):
            raise RowError(
                "placeholder",
                f"turn {number} has a {mark} for {kind} number {index + 1}, but the row has "
                f"{_count(len(self.listed[kind]), kind)}. Add the {kind} or remove the placeholder.",
            )
        self.taken[kind] = index + 1
        self.mentioned.add(f"{kind}#{index}")
        return self.listed[kind][index]

    def put_unmentioned_first(self, turns: list[Turn], image_end: str) -> list[Turn]:
        """Put images and videos that no placeholder mentions in front of the first user turn, each with its end."""
        left = [Source("image", value) for mark, value in self.named.items() if mark not in self.mentioned]
        if self.single is not None and "single" not in self.mentioned:
            left.append(Source("image", self.single))
        for kind, values in self.listed.items():
            left += [
                Source(kind, value)
                for index, value in enumerate(values)
                if f"{kind}#{index}" not in self.mentioned
            ]
        if not left:
            return turns
        first = next(index for index, turn in enumerate(turns) if turn.role == "user")
        front: list[Any] = [part for source in left for part in (source, image_end) if part]
        parts = (*front, *turns[first].parts)
        turns[first] = Turn("user", parts, turns[first].learn)
        return turns


def _are_films(value: Any) -> bool:
    """Whether a list under 'video' holds films; otherwise it holds the frames of one video."""
    return isinstance(value, (list, tuple)) and all(
        isinstance(item, (list, tuple)) or (isinstance(item, str) and item.lower().endswith(_FILMS))
        for item in value
    )


def a(value: Any) -> str:
    """A value's type in words, for messages."""
    names = {"str": "a text", "int": "a number", "float": "a number", "list": "a list", "dict": "an object",
             "bool": "true or false", "NoneType": "missing (null)"}  # fmt: skip
    return names.get(type(value).__name__, f"a {type(value).__name__}")


def listed(keys: Iterable[Any]) -> str:
    """Some keys, for messages."""
    return ", ".join(repr(str(key)) for key in list(keys)[:8]) or "(none)"


def _count(number: int, word: str) -> str:
    return f"{number or 'no'} {word}{'' if number == 1 else 's'}"

"""What a conversation is once it is read: turns made of text and media, and which medium a placeholder stands for.

Every file format ends here (``data/row_parsing.py``), and every prompt starts here (``data/prompts.py``).

A row names its media in ``image``, ``images``, ``video`` or ``videos``, and, where the model
hears, in ``audio`` or ``audios``:

- a single image is meant by every ``<image>`` in the row;
- in a list, the first ``<image>`` (or ``<ImageHere>``) means the first image, and so on; ``<image_02>``, or a part
  with ``"index": 2``, the third;
- in a dictionary, the placeholders are the keys, and may stand anywhere and more than once.

What no placeholder mentions is put in front of the first user turn, in the order of the row, each followed by a
newline (by nothing for InternLM-XComposer2). A placeholder without an image is an error, and so is a placeholder of
another program such as ``<image 1>``. A backslash in front of a placeholder, or of another control text, makes it
plain text; in a row with ``literal_control_tokens`` all are but the first for each medium.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from minicpm_tune.data.grounding import BOX_MARK, REF_MARK, Box, Objects, Ref, Tag
from minicpm_tune.data.row_keys import NOTHING, name_list
from minicpm_tune.errors import RowError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Media:
    """The place of an image, a video or an audio in a text.

    Attributes:
        kind: ``image``, ``video`` or ``audio``.
        index: Its number among the conversation's media, counted in the order of the text.
        sound: Whether it is a video that is taken with its sound.
    """

    kind: str
    index: int
    sound: bool = field(default=False, repr=False)

    @property
    def heard(self) -> bool:
        """Whether the model hears something of it."""
        return self.kind == "audio" or self.sound


@dataclass(frozen=True)
class Literal:
    """A control text such as ``<image>`` or ``<|im_end|>`` that is meant as plain text."""

    text: str


Part = str | Media | Literal | Ref | Box | Tag


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        parts: Its content in order.
        weight: How much the tokens of an assistant turn count in the loss; 0: they are not supervised.
        thoughts: What the assistant thinks before its answer, where the row gives it apart from the answer.
        literal: Whether every control text in it is plain text (``literal_control_tokens``).
    """

    role: str
    parts: tuple[Part, ...]
    weight: float = 1.0
    thoughts: str | None = field(default=None, repr=False)
    literal: bool = field(default=False, repr=False)

    @property
    def text(self) -> str:
        """The content without its media."""
        parts = (part for part in self.parts if not isinstance(part, Media))
        return "".join(part if isinstance(part, str) else part.text for part in parts)


def media_of(turns: Iterable[Turn]) -> list[Media]:
    """The media of all turns, in the order of the text."""
    return [part for turn in turns for part in turn.parts if isinstance(part, Media)]


_MARK = r"<image>|<image_\d+>|<ImageHere>|<video>"
# Texts that some tokenizer or chat template reads as structure.
_CONTROL = (
    r"<audio>|<bbox>|<ref-object>|<\|\w+\|>|</?s>|<unk>|</image>|</?slice>|</?image_id>|</?(?:ref|box|quad|point)>|"
    r"</?think>|</?tool_(?:call|response)>|</?img>|<用户>|<AI>|\[UNUSED_TOKEN_\d+\]"
)
ESCAPABLE = rf"(?:{_MARK}|{_CONTROL})"
_ESCAPED = rf"\\{ESCAPABLE}"
# Placeholders of other programs. Those of _LOOSE are also tags of HTML and XML, and mean an image only beside one.
_FOREIGN = (
    r"<(?:image|img|picture|photo|video|audio)s?[ _#:-]*\d+>|<\|(?:image|video|audio)(?:_\d+)?\|>|<img>[^<>]*</img>|"
    r"<audio>"
)
_LOOSE = r"<\s*(?:image|img|video)s?\s*/?\s*>|<imagehere>|<image[ _-]?(?:pad|placeholder|token)>"
MARKS = re.compile(
    rf"(?P<escaped>{_ESCAPED})|(?P<mark>{_MARK})|(?P<object>{BOX_MARK}|{REF_MARK})|(?P<foreign>(?i:{_FOREIGN}))|(?P<loose>(?i:{_LOOSE}))"
)
_FILMS = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg")
_FIRST_IMAGE = ("<image>", "<ImageHere>", "<image_00>", "<image_0>")


@dataclass(frozen=True)
class Source:
    """Where an image or a video comes from.

    Attributes:
        kind: ``image``, ``video`` or ``audio``.
        value: A path, URL, data URI, bytes, or ``{"bytes":, "path":}``; a video may be a list of these, and an audio
            ``{"array":, "sampling_rate":}``.
        fps: Frames taken per second of this video; None: as for all.
        max_frames: Most frames of this video; None: as for all.
        sound: Whether this video is taken with its sound.
    """

    kind: str
    value: Any
    fps: float | None = None
    max_frames: int | None = None
    sound: bool = False


class MediaReader:
    """Gives every placeholder of a row its image or video.

    Args:
        row: The row.
        literal: Whether placeholders are plain text, but the first for each medium.
        hears: Whether the model takes audio.
        sound: Whether videos are taken with their sound, where a part does not say so itself.
    """

    def __init__(
        self, row: Mapping[str, Any], *, literal: bool = False, hears: bool = False, sound: bool = False
    ) -> None:
        self.literal, self.hears, self.sound = literal, hears, sound
        self.named: dict[str, Any] = {}
        self.single: Any = None
        self.listed: dict[str, list[Any]] = {"image": [], "video": [], "audio": []}
        self.taken: dict[str, int] = dict.fromkeys(self.listed, 0)
        self.mentioned: set[str] = set()
        self.objects = Objects(row.get("objects"))
        for kind in ("image", "video", "audio") if hears else ("image", "video"):
            one: Any = row.get(kind)
            several: Any = row.get(f"{kind}s")
            if one not in NOTHING and several not in NOTHING:
                raise RowError(
                    "media", f"the row has both {kind!r} and '{kind}s', expected one. Remove one of them."
                )
            if kind == "image":
                self._add_images(several if one in NOTHING else one)
            elif kind == "audio":
                value = several if one in NOTHING else one
                if value not in NOTHING:
                    self.listed["audio"] = list(value) if isinstance(value, (list, tuple)) else [value]
            elif one not in NOTHING:
                self.listed["video"] = list(one) if _are_films(one) else [one]
            elif several not in NOTHING:
                self.listed["video"] = list(several) if isinstance(several, (list, tuple)) else [several]

    def _add_images(self, value: Any) -> None:
        if value in NOTHING:
            return
        if isinstance(value, Mapping) and not {"bytes", "path"} & set(value):
            # Parquet fills in None
            present = {str(key): image for key, image in value.items() if image is not None}
            wrong = [key for key in present if not re.fullmatch(r"<image_\d+>|<image>|<ImageHere>", key)]
            if wrong:
                raise RowError(
                    "media",
                    f"'image' has the key {wrong[0]!r}, expected keys like '<image_00>'. Write the placeholder as key.",
                )
            self.named = present
        elif isinstance(value, (list, tuple)):
            self.listed["image"] = list(value)
        else:
            self.single = value

    @property
    def images(self) -> list[Any]:
        """The images that the row lists, in its order; those of content parts are not among them."""
        return [self.single] if self.single is not None else list(self.named.values()) or self.listed["image"]

    @property
    def _has_media(self) -> bool:
        return bool(self.named or self.single is not None or any(self.listed.values()))

    def split(self, text: str, number: int) -> Iterator[str | Source | Literal | Ref | Box]:
        """The parts of a text in turn ``number``: its placeholders as the sources they stand for."""
        position = 0
        for found in MARKS.finditer(text):
            part = self._part(found, number)
            if part is None:
                continue
            if found.start() > position:
                yield text[position : found.start()]
            yield part
            position = found.end()
        if position < len(text):
            yield text[position:]

    def _part(self, found: re.Match[str], number: int) -> Source | Literal | Ref | Box | None:
        """What stands for a placeholder; None leaves it in the text."""
        mark = found.group()
        if found["escaped"]:
            return Literal(mark[1:])
        if found["object"]:
            if self.literal and not self.objects.holds(mark):
                return Literal(mark)
            return self.objects.take(mark, number)
        if found["mark"] or (self.hears and mark == "<audio>"):
            if self.literal and not self._holds(mark):
                return Literal(mark)
            return self.take(mark, number)
        if self.literal:
            return Literal(mark)
        if found["loose"] and not self._has_media:
            return None
        raise RowError(
            "placeholder",
            f"turn {number} has {mark!r:.80}, which is no placeholder here, expected <image> (in the order of "
            "'images'), <image_00>, <image_01> (counted from 0), or <video>. Rewrite it; if it is meant as text, put a "
            'backslash in front of it, or set "literal_control_tokens": true in the row.',
        )

    def _holds(self, mark: str) -> bool:
        """Whether the row has a medium for a placeholder that no placeholder has taken yet."""
        if mark in ("<video>", "<audio>"):
            kind = mark[1:-1]
            index = self.taken[kind]
            return index < len(self.listed[kind]) and f"{kind}#{index}" not in self.mentioned
        if self.named:
            return mark in self.named and mark not in self.mentioned
        if self.single is not None:
            return mark in _FIRST_IMAGE and "single" not in self.mentioned
        index = _number(mark) if mark.startswith("<image_") else self.taken["image"]
        return index < len(self.listed["image"]) and f"image#{index}" not in self.mentioned

    def take(self, mark: str, number: int) -> Source:
        """The source that a placeholder in turn ``number`` stands for."""
        if mark in ("<video>", "<audio>"):
            kind = mark[1:-1]
            return Source(kind, self._next(kind, mark, number), sound=self.sound and kind == "video")
        if self.named:
            if mark not in self.named:
                raise RowError(
                    "placeholder",
                    f"turn {number} mentions {mark}, but the row's images are {name_list(self.named)}. Add the image "
                    "or remove the placeholder.",
                )
            self.mentioned.add(mark)
            return Source("image", self.named[mark])
        if self.single is not None and mark in _FIRST_IMAGE:
            self.mentioned.add("single")
            return Source("image", self.single)
        if mark.startswith("<image_"):
            return Source("image", self.at("image", _number(mark), f"mentions {mark}", number))
        return Source("image", self._next("image", mark, number))

    def at(self, kind: str, index: Any, what: str, number: int) -> Any:
        """The medium of a kind at a place in the row's list, counted from 0; it may be asked for more than once."""
        if kind == "image" and self.single is not None and index == 0:
            self.mentioned.add("single")
            return self.single
        values = self.listed[kind]
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(values):
            raise RowError(
                "placeholder",
                f"turn {number} {what}, but the row has {_count(len(values), kind)} in a list, counted from 0. Add the "
                f"{kind} or remove the placeholder.",
            )
        self.mentioned.add(f"{kind}#{index}")
        return values[index]

    def _next(self, kind: str, mark: str, number: int) -> Any:
        index = self.taken[kind]
        if index >= len(self.listed[kind]):
            raise RowError(
                "placeholder",
                f"turn {number} has a {mark} for {kind} number {index + 1}, but the row has "
                f"{_count(len(self.listed[kind]), kind)}. Add the {kind} or remove the placeholder; if it is meant as "
                "text, put a backslash in front of it.",
            )
        self.taken[kind] = index + 1
        self.mentioned.add(f"{kind}#{index}")
        return self.listed[kind][index]

    def put_unmentioned_first(self, turns: list[Turn], image_end: str) -> list[Turn]:
        """Put media that no placeholder mentions in front of the first user turn, each with its end.

        A video with its sound has none: the released form joins it with what follows by nothing.
        """
        left = [Source("image", value) for mark, value in self.named.items() if mark not in self.mentioned]
        if self.single is not None and "single" not in self.mentioned:
            left.append(Source("image", self.single))
        for kind, values in self.listed.items():
            left += [
                Source(kind, value, sound=self.sound and kind == "video")
                for index, value in enumerate(values)
                if f"{kind}#{index}" not in self.mentioned
            ]
        if not left:
            return turns
        first = next(index for index, turn in enumerate(turns) if turn.role == "user")
        front: list[Any] = [
            part for source in left for part in (source, "" if source.sound else image_end) if part
        ]
        turns[first] = replace(turns[first], parts=(*front, *turns[first].parts))
        return turns


def _number(mark: str) -> int:
    return int(mark[len("<image_") : -1])


def _are_films(value: Any) -> bool:
    """Whether a list under 'video' holds films; otherwise it holds the frames of one video."""
    return isinstance(value, (list, tuple)) and all(
        isinstance(item, (list, tuple)) or (isinstance(item, str) and item.lower().endswith(_FILMS))
        for item in value
    )


def _count(number: int, word: str) -> str:
    return f"{number or 'no'} {word}{'' if number == 1 else 's'}"

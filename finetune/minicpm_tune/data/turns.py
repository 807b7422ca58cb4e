"""What a conversation is once it is read: turns made of text and media, and which medium a placeholder stands for.

Every file format ends here (``data/row_parsing.py``), and every prompt starts here (``data/prompts.py``). What rows
may hold is told in ``docs/data.md``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from minicpm_tune.data.objects import BOX_MARK, REF_MARK, Box, Objects, Ref, Tag
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
    """Gives every placeholder of a row its medium, of those that the row names under ``image``, ``images`` and so on.

    A single image is meant by every ``<image>``; in a list, the first ``<image>`` or ``<ImageHere>`` means the first
    image, and ``<image_02>``, or a part with ``"index": 2``, the third; in a dictionary, the placeholders are the keys,
    and may stand anywhere and more than once. A placeholder without an image is an error, and so is one of another
    program, such as ``<image 1>``, unless it is plain text: behind a backslash, or where texts are ``literal``.

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
        self.listed: dict[str, list[Any]] = {"image": [], "video": [], "audio": []}  # what the row names
        self.single = False  # whether that is one image, which every <image> means
        self.names: dict[str, int] = {}  # which image a placeholder means, where that is no matter of order
        self.taken: dict[str, int] = dict.fromkeys(self.listed, 0)  # how many were taken in order
        self.mentioned: set[tuple[str, int]] = set()
        self.objects = Objects(row.get("objects"))
        for kind in ("image", "video", "audio") if hears else ("image", "video"):
            one, several = row.get(kind), row.get(f"{kind}s")
            if one not in NOTHING and several not in NOTHING:
                raise RowError(
                    "media", f"the row has both {kind!r} and '{kind}s', expected one. Remove one of them."
                )
            value = several if one in NOTHING else one
            if value in NOTHING:
                continue
            if kind == "image" and not isinstance(value, (list, tuple)):
                self._add_images(value)
            elif not isinstance(value, (list, tuple)) or (
                value is one and kind == "video" and not _are_films(one)
            ):
                self.listed[kind] = [value]
            else:
                self.listed[kind] = list(value)

    def _add_images(self, value: Any) -> None:
        """Take a single image, or a dictionary of placeholders."""
        self.single = not isinstance(value, Mapping) or bool({"bytes", "path"} & set(value))
        if self.single:
            self.listed["image"], self.names = [value], dict.fromkeys(_FIRST_IMAGE, 0)
            return
        # Parquet fills in None
        present = {str(key): image for key, image in value.items() if image is not None}
        wrong = [key for key in present if not re.fullmatch(r"<image_\d+>|<image>|<ImageHere>", key)]
        if wrong:
            raise RowError(
                "media",
                f"'image' has the key {wrong[0]!r}, expected keys like '<image_00>'. Write the placeholder as key.",
            )
        self.listed["image"] = list(present.values())
        self.names = {mark: index for index, mark in enumerate(present)}

    @property
    def images(self) -> list[Any]:
        """The images that the row lists, in its order; those of content parts are not among them."""
        return self.listed["image"]

    def split(self, text: str, number: int) -> Iterator[str | Source | Literal | Ref | Box]:
        """The parts of a text in turn ``number``: its placeholders as the sources they stand for."""
        position = 0
        for found in MARKS.finditer(text):
            yield text[position : found.start()]
            yield self._part(found, number)
            position = found.end()
        yield text[position:]

    def _part(self, found: re.Match[str], number: int) -> str | Source | Literal | Ref | Box:
        """What stands for a placeholder; a text where it is none."""
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
        if found["loose"] and not any(self.listed.values()):
            return mark
        raise RowError(
            "placeholder",
            f"turn {number} has {mark!r:.80}, which is no placeholder here, expected <image> (in the order of "
            "'images'), <image_00>, <image_01> (counted from 0), or <video>. Rewrite it; if it is meant as text, put a "
            'backslash in front of it, or set "literal_control_tokens": true in the row.',
        )

    def _holds(self, mark: str) -> bool:
        """Whether the row has a medium for a placeholder that no placeholder has taken yet."""
        kind = _kind(mark)
        if kind == "image" and self.names:
            index = self.names.get(mark)
        else:
            index = _number(mark) if mark.startswith("<image_") else self.taken[kind]
        return index is not None and index < len(self.listed[kind]) and (kind, index) not in self.mentioned

    def take(self, mark: str, number: int) -> Source:
        """The source that a placeholder in turn ``number`` stands for."""
        kind = _kind(mark)
        if mark in self.names:
            return self._source(kind, self.names[mark])
        if kind == "image" and self.names and not self.single:
            raise RowError(
                "placeholder",
                f"turn {number} mentions {mark}, but the row's images are {name_list(self.names)}. Add the image "
                "or remove the placeholder.",
            )
        if mark.startswith("<image_"):
            return self.at(kind, _number(mark), f"mentions {mark}", number)
        index, count = self.taken[kind], len(self.listed[kind])
        if index >= count:
            raise RowError(
                "placeholder",
                f"turn {number} has a {mark} for {kind} number {index + 1}, but the row has {_count(count, kind)}. Add "
                f"the {kind} or remove the placeholder; if it is meant as text, put a backslash in front of it.",
            )
        self.taken[kind] = index + 1
        return self._source(kind, index)

    def at(self, kind: str, index: Any, what: str, number: int) -> Source:
        """The medium of a kind at a place in the row's list, counted from 0; it may be asked for more than once."""
        if kind == "image" and self.single and index == 0:
            return self._source(kind, 0)
        count = 0 if kind == "image" and self.names else len(self.listed[kind])
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < count:
            raise RowError(
                "placeholder",
                f"turn {number} {what}, but the row has {_count(count, kind)} in a list, counted from 0. Add the "
                f"{kind} or remove the placeholder.",
            )
        return self._source(kind, index)

    def _source(self, kind: str, index: int) -> Source:
        self.mentioned.add((kind, index))
        return Source(kind, self.listed[kind][index], sound=self.sound and kind == "video")

    def put_unmentioned_first(self, turns: list[Turn], image_end: str) -> list[Turn]:
        """Put media that no placeholder mentions in front of the first user turn, in the order of the row.

        Behind each stands ``image_end``; behind a video with its sound nothing, as in the released form.
        """
        left = [
            self._source(kind, index)
            for kind, values in self.listed.items()
            for index in range(len(values))
            if (kind, index) not in self.mentioned
        ]
        if not left:
            return turns
        first = next(index for index, turn in enumerate(turns) if turn.role == "user")
        front: list[Any] = [part for each in left for part in (each, "" if each.sound else image_end)]
        turns[first] = replace(turns[first], parts=(*front, *turns[first].parts))
        return turns


def numbered_media(turns: Sequence[Turn]) -> tuple[tuple[Turn, ...], tuple[Source, ...]]:
    """Number the media in the order of the text, and join texts that touch."""
    sources: list[Source] = []
    numbered: list[Turn] = []
    for turn in turns:
        parts: list[Part] = []
        for part in turn.parts:
            before = parts[-1] if parts else None
            if isinstance(part, Source):
                parts.append(Media(part.kind, len(sources), part.sound))
                sources.append(part)
            elif isinstance(part, str) and isinstance(before, str):
                parts[-1] = before + part
            elif isinstance(part, Literal) and isinstance(before, Literal):
                parts[-1] = Literal(before.text + part.text)
            elif part:  # no empty text
                parts.append(part)
        numbered.append(replace(turn, parts=tuple(parts)))
    return tuple(numbered), tuple(sources)


def placed_boxes(
    turns: tuple[Turn, ...], sources: Sequence[Source], listed: Sequence[Any]
) -> tuple[Turn, ...]:
    """Have every box name its picture by its number among the media, in place of that among the row's images.

    Args:
        turns: The turns.
        sources: Where their media come from.
        listed: The images that the row lists; those of content parts follow, in the order of the text.
    """
    used = [(index, source.value) for index, source in enumerate(sources) if source.kind == "image"]
    images = [*listed, *(value for _, value in used if not any(value is each for each in listed))]

    def placed(part: Part) -> Part:
        if not isinstance(part, Box):
            return part
        if part.image >= len(images):
            raise RowError(
                "boxes",
                f"objects.image_id of box {part.number} is {part.image}, but the row has {len(images)} images, counted "
                "from 0. Fix the number, or add the image.",
            )
        return replace(part, image=next(index for index, value in used if value is images[part.image]))

    return tuple(replace(turn, parts=tuple(map(placed, turn.parts))) for turn in turns)


def _kind(mark: str) -> str:
    return mark[1:-1] if mark in ("<video>", "<audio>") else "image"


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

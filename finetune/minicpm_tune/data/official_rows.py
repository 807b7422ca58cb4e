"""A row of any accepted form -> the official form: ``id``, ``image``, ``conversations``.

Every row that is written is read again and compared with the row it came from, so that both give the same samples.
What the official form lacks, videos, audios, objects, weights and thoughts, stays under the keys that rows here have.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minicpm_tune.data.media.sources import decode_data_uri, find_file, is_remote
from minicpm_tune.data.objects import Box, Ref
from minicpm_tune.data.row_parsing import ParsedRow, parse_row
from minicpm_tune.data.turns import ESCAPABLE, Literal, Media, Part, Source, Turn
from minicpm_tune.errors import RowError

_END = "\ue0f0"  # stands behind media that no placeholder mentions, while a row is read; no text holds it
# How files start, and what they are called; others keep the end of the name that came with them, or get ".bin".
_KINDS = (
    (b"\x89PNG", ".png"), (b"\xff\xd8", ".jpg"), (b"GIF8", ".gif"), (b"BM", ".bmp"), (b"fLaC", ".flac"),
    (b"ID3", ".mp3"), (b"OggS", ".ogg"), (b"\x1aE\xdf\xa3", ".webm"), (b"II*\x00", ".tif"), (b"MM\x00*", ".tif"),
)  # fmt: skip


class OfficialForm:
    """Writes rows in the official form.

    Args:
        output: The file that the rows go into; paths in them are relative to its folder.
        media: Where images, videos and audio that rows hold as bytes or base64 are written to.
    """

    def __init__(self, output: Path, media: Path) -> None:
        self.folder, self.media = output.absolute().parent, media.absolute()

    def write(self, row: Any, folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Write one row.

        Args:
            row: The parsed row.
            folder: What its relative paths are relative to.

        Returns:
            The row in the official form, and the keys that nothing reads and that are left out.

        Raises:
            RowError: When it can't be used, or can't be written so that it means the same.
        """
        parsed = _read(row)
        sources = [replace(source, value=self._value(source, folder)) for source in parsed.sources]
        written = _Writer(parsed.turns, sources).row()
        if parsed.row_id is not None:
            written = {"id": parsed.row_id, **written}
        again = _read(written)
        if again.turns != parsed.turns or list(again.sources) != sources:
            raise RowError(
                "form",
                "the row has no counterpart in the official form that gives the same text and media. Rewrite it.",
            )
        return written, parsed.unknown_keys

    def _value(self, source: Source, folder: Path) -> Any:
        """A source as the new file names it: a path, or what only the row itself can hold."""
        if isinstance(source.value, (list, tuple)):
            return [self._value(Source(source.kind, each), folder) for each in source.value]
        value = source.value
        name = ""
        if isinstance(value, Mapping):
            if value.get("array") is not None:  # samples of an audio; a file would round them
                return dict(value)
            name = value.get("path") or ""
            value = (value.get("path") or value.get("url")) if value.get("bytes") is None else value["bytes"]
        if isinstance(value, str) and value.startswith("data:"):
            value = decode_data_uri(value, f"{value[:40]!r}")
        if isinstance(value, (bytes, bytearray)):
            return self._relative(self._saved(bytes(value), Path(name).suffix))
        if not isinstance(value, str) or not value.strip():
            raise RowError(
                "media", f"{source.kind} is {value!r:.80}, expected a path, bytes or base64. Fix the row."
            )
        if is_remote(value):
            return value
        path = find_file(value, folder)
        if not path.exists():
            raise RowError(
                f"missing {source.kind}",
                f"{source.kind} {value!r:.200} not found (looked at {str(path.absolute())!r:.300}), expected a file. "
                "Fix the path, or say what it is relative to with --image_folder.",
            )
        return str(path) if path.is_absolute() and Path(value).is_absolute() else self._relative(path)

    def _relative(self, path: Path) -> str:
        return Path(os.path.relpath(path.absolute(), self.folder)).as_posix()

    def _saved(self, data: bytes, ending: str) -> Path:
        """Write bytes to a file named by their hash; the same bytes are the same file."""
        kind = next((kind for start, kind in _KINDS if data.startswith(start)), None)
        if data[:4] == b"RIFF":
            kind = {b"WEBP": ".webp", b"WAVE": ".wav", b"AVI ": ".avi"}.get(data[8:12])
        elif data[4:8] == b"ftyp":
            kind = ending or ".mp4"
        path = self.media / (hashlib.sha256(data).hexdigest()[:24] + (kind or ending or ".bin"))
        if not path.is_file():
            self.media.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.partial")
            partial.write_bytes(data)
            partial.replace(path)
        return path


def _read(row: Any) -> ParsedRow:
    return parse_row(row, image_end=_END, hears=True)


class _Writer:
    """The turns of one row as messages, and its media under their keys."""

    def __init__(self, turns: Sequence[Turn], sources: Sequence[Source]) -> None:
        self.turns, self.sources = turns, sources
        self.images: list[Any] = []  # in the order of their names
        self.number_of: dict[int, int] = {}  # medium -> number of its image
        self.in_text: list[int] = []  # numbers of those that a placeholder mentions
        self.mentioned: dict[str, list[Any]] = {"video": [], "audio": []}
        self.left: dict[str, list[Any]] = {"video": [], "audio": []}
        for turn in turns:
            for place, part in enumerate(turn.parts):
                if isinstance(part, Media) and not _sampled(turn, sources):
                    self._place(part, unmentioned=_is_end(turn.parts, place + 1))

    def _place(self, part: Media, *, unmentioned: bool) -> None:
        value = self.sources[part.index].value
        if part.kind != "image":
            (self.left if unmentioned else self.mentioned)[part.kind].append(value)
            return
        again = [number for number in self.in_text if self.images[number] == value]
        if unmentioned or not again:
            self.images.append(value)
            again = [len(self.images) - 1]
        if not unmentioned:
            self.in_text += again
        self.number_of[part.index] = again[0]

    def row(self) -> dict[str, Any]:
        """The row, without its id."""
        row: dict[str, Any] = {}
        if len(self.images) == 1:
            row["image"] = self.images[0]
        elif self.images:
            row["image"] = {self._name(number): value for number, value in enumerate(self.images)}
        for kind in ("video", "audio"):
            values = self.mentioned[kind] + self.left[kind]
            if values:
                one = len(values) == 1 and isinstance(values[0], str)
                row |= {kind: values[0]} if one else {f"{kind}s": values}
        row |= self._objects()
        if any(turn.literal for turn in self.turns):
            row["literal_control_tokens"] = True
        row["conversations"] = [self._message(turn) for turn in self.turns]
        return row

    def _name(self, number: int) -> str:
        return "<image>" if len(self.images) == 1 else f"<image_{number:02d}>"

    def _message(self, turn: Turn) -> dict[str, Any]:
        message: dict[str, Any] = {"role": turn.role, "content": self._content(turn)}
        if turn.weight != 1:
            message["weight"] = turn.weight
        if turn.thoughts is not None:
            message["reasoning_content"] = turn.thoughts
        return message

    def _content(self, turn: Turn) -> str | list[dict[str, Any]]:
        if _sampled(turn, self.sources):
            return [self._as_part(part) for part in turn.parts]
        texts = []
        for place, part in enumerate(turn.parts):
            if not isinstance(part, Media):
                after_media = place and isinstance(turn.parts[place - 1], Media)
                texts.append(_text(part).removeprefix(_END if after_media else ""))
            elif not _is_end(turn.parts, place + 1):
                number = self.number_of.get(part.index)
                texts.append(f"<{part.kind}>" if number is None else self._name(number))
        return "".join(texts)

    def _as_part(self, part: Part) -> dict[str, Any]:
        """A part of a message in which a video has its own ``fps``, which only content parts can say."""
        if not isinstance(part, Media):
            return {"type": "text", "text": _text(part)}
        source = self.sources[part.index]
        own = {"fps": source.fps, "max_frames": source.max_frames}
        return {"type": part.kind, part.kind: source.value} | {
            key: value for key, value in own.items() if value is not None
        }

    def _objects(self) -> dict[str, Any]:
        parts = [part for turn in self.turns for part in turn.parts]
        boxes = [part for part in parts if isinstance(part, Box)]
        refs = [part.name for part in parts if isinstance(part, Ref)]
        objects: dict[str, Any] = {"ref": refs} if refs else {}
        if boxes:
            objects["bbox"] = [list(box.values) for box in boxes]
            units, images = {box.unit for box in boxes}, [self.number_of.get(box.image, 0) for box in boxes]
            if units != {"real"}:
                objects["bbox_type"] = units.pop()
            if any(images):
                objects["image_id"] = images
        return {"objects": objects} if objects else {}


def _sampled(turn: Turn, sources: Sequence[Source]) -> bool:
    """Whether a video of a turn has its own ``fps`` or ``max_frames``."""
    media = [sources[part.index] for part in turn.parts if isinstance(part, Media)]
    return any(source.fps is not None or source.max_frames is not None for source in media)


def _is_end(parts: Sequence[Part], place: int) -> bool:
    part = parts[place] if place < len(parts) else None
    return isinstance(part, str) and part.startswith(_END)


def _text(part: Part) -> str:
    """A part that is no medium, as a row writes it."""
    assert not isinstance(part, Media), part
    if isinstance(part, str):
        return part
    if isinstance(part, Literal):
        return re.sub(ESCAPABLE, lambda found: "\\" + found.group(), part.text)
    return part.text

"""A row in a report: its prompt, its pictures with their cuts and boxes, its sounds, and what is wrong with it."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from minicpm_tune.batch import IGNORE_INDEX
from minicpm_tune.data.grounding import PixelBox
from minicpm_tune.data.media.audio import RATE, Clip
from minicpm_tune.data.media.images import Picture
from minicpm_tune.data.samples import Plan, Processing, TrainingRows
from minicpm_tune.data.slicing.layouts import ImageLayout
from minicpm_tune.errors import RowError
from minicpm_tune.pages.page import data_uri, thumbnail
from minicpm_tune.planning.sample_preview import PromptPart, prompt_parts, spectrogram

_SIDES = (896, 448, 224)  # longest side of a picture in a report, in pixels: the first that fits
_FRAME_SIDE = 320  # the same of a video's frame
_MOST_PICTURES = 8  # of a row in a report
_MOST_FRAMES = 12  # of a video in a report
_LONGEST_SOUND = 30  # seconds of a clip in a report
_SHORTEST_SOUND = 2  # seconds; less than this is not worth hearing
_LONGEST_PROMPT = 20_000  # characters of a row in a report
_BASE64 = 4 / 3  # characters of a page for a byte
_HEADER = 100  # characters: the beginning of a data URI, and the header of a .wav file


@dataclass(frozen=True)
class PictureView:
    """A picture, or a frame, of a row in a report.

    Attributes:
        source: The picture as a data URI; None where the page had no room for it.
        width: Of the picture itself, in pixels.
        height: The same.
        caption: What it is, with the slices it becomes.
        cuts: Where it is cut, as fractions of its width and of its height.
        boxes: (name, left, top, width, height) of what the row points at, as fractions; a point has no size.
    """

    source: str | None
    width: int
    height: int
    caption: str
    cuts: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    boxes: tuple[tuple[str, float, float, float, float], ...] = ()


@dataclass(frozen=True)
class SoundView:
    """A sound of a row in a report: its data URI (None where the page had no room for it), and what it is."""

    source: str | None
    caption: str


@dataclass
class RowView:
    """A row in a report.

    Attributes:
        row_id: Its ``id``, if it has one.
        prompt: Its prompt; empty for a row that has none.
        pictures: Its pictures and frames.
        sounds: Its sounds.
        spectrogram: What the model hears of them, as a data URI.
        problem: Why it can't be used.
        raw: The row as it stands in its file, for one without a prompt.
        notes: What was left out, and the like.
        cost: Characters of its media in the page.
    """

    row_id: Any = None
    prompt: list[PromptPart] = field(default_factory=list)
    pictures: list[PictureView] = field(default_factory=list)
    sounds: list[SoundView] = field(default_factory=list)
    spectrogram: str | None = None
    problem: str | None = None
    raw: str | None = None
    notes: list[str] = field(default_factory=list)
    cost: int = 0


def view_row(rows: TrainingRows, index: int, *, room: int) -> RowView:
    """Make the view of a row, of a bad one as far as it goes.

    Args:
        rows: The data set.
        index: The row's number.
        room: Most characters that its media may take in the page.
    """
    view = RowView()
    processing, plan = rows.processing, None
    boxes: list[list[PixelBox]] = []
    try:
        row = rows.parse(index)
        view.row_id = row.row_id
        opened = rows.open_media(index, row.sources)
        plan = processing.whole_plan(row.turns, opened)
        boxes = processing.boxes(row.turns, opened)
        plan = processing.fit(plan)
    except RowError as error:
        view.problem = str(error)
    if plan is None:
        view.raw = _shortened_text(_raw_text(rows, index))
        return view
    _add_prompt(view, plan, processing)
    try:
        for part in _media(plan, boxes, view, room):
            if isinstance(part, SoundView):
                view.sounds.append(part)
            else:
                view.pictures.append(part)
            view.cost += len(part.source or "")
        if plan.clips and view.problem is None:
            view.spectrogram = _spectrogram(plan, processing, room - view.cost)
            view.cost += len(view.spectrogram or "")
    except RowError as error:
        view.problem = view.problem or str(error)
    return view


def _raw_text(rows: TrainingRows, index: int) -> str:
    try:
        value: Any = rows.mixture.read(index)
    except RowError as error:
        return str(error)
    return json.dumps(value, indent=1, ensure_ascii=False, default=_short_name)


def _short_name(value: Any) -> str:
    return f"({len(value)} bytes)" if isinstance(value, bytes) else str(value)


def _shortened_text(text: str) -> str:
    left = len(text) - _LONGEST_PROMPT
    return text if left <= 0 else f"{text[:_LONGEST_PROMPT]}\n... and {left:,} more characters"


def _add_prompt(view: RowView, plan: Plan, processing: Processing) -> None:
    encoded = plan.encoded
    learned = [float(label != IGNORE_INDEX) for label in encoded.labels]
    weights = [one * weight for one, weight in zip(learned, encoded.weights or learned, strict=True)]
    parts = prompt_parts(encoded.input_ids, weights, processing.tokenizer, processing.style)
    view.prompt = shortened(parts, _LONGEST_PROMPT)
    cut_off = len(plan.pictures) - len(encoded.media_spans)
    if cut_off:
        view.notes.append(
            f"{cut_off} of its images, videos and sounds lie behind the cut at --model_max_length."
        )


def shortened(parts: Sequence[PromptPart], most: int) -> list[PromptPart]:
    """A prompt whose texts have at most ``most`` characters: its beginning and its end.

    Example:
        >>> [part.text for part in shortened([PromptPart("abcdef"), PromptPart("ghi", weight=1.0)], 4)]
        ['ab', ' ... 5 characters ... ', 'hi']
    """
    total = sum(len(part.text) for part in parts)
    if total <= most:
        return list(parts)
    before: list[PromptPart] = []
    after: list[PromptPart] = []
    place = 0
    for part in parts:
        end = place + len(part.text)
        head = part.text[: max(most // 2 - place, 0)]
        tail = part.text[max(total - most // 2 - place, 0) :]
        before += [replace(part, text=head)] if head else []
        after += [replace(part, text=tail)] if tail else []
        place = end
    gap = PromptPart(f" ... {total - most // 2 * 2:,} characters ... ", control=True)
    return [*before, gap, *after]


def _media(
    plan: Plan, boxes: Sequence[Sequence[PixelBox]], view: RowView, room: int
) -> Iterator[PictureView | SoundView]:
    """The row's media one by one, each with its share of the room that is left."""
    images = sum(picture.kind == "image" for picture in plan.pictures)
    for number, (picture, layouts) in enumerate(zip(plan.pictures, plan.layouts, strict=True)):
        share = (room - view.cost) // max(min(len(plan.pictures), _MOST_PICTURES) - number, 1)
        if number >= _MOST_PICTURES:
            view.notes.append(f"{len(plan.pictures) - number} more are not shown.")
            return
        if isinstance(picture, Clip):
            yield _sound(picture, share)
        elif picture.kind == "image":
            name = f"image {number + 1} of {images}" if images > 1 else "image"
            shown = _picture(next(iter(picture.frames())), layouts[0], name, share)
            yield replace(shown, boxes=_in_fractions(boxes[number], *picture.sizes[0]))
        else:
            yield from _frames(picture, layouts, share)


def _in_fractions(boxes: Sequence[PixelBox], width: int, height: int) -> tuple[PixelBox, ...]:
    """(name, left, top, width, height) as fractions of a picture."""
    return tuple(
        (name, left / width, top / height, (right - left) / width, (bottom - top) / height)
        for name, left, top, right, bottom in boxes
    )


def _frames(video: Picture, layouts: Sequence[ImageLayout], room: int) -> Iterator[PictureView]:
    count = len(video.sizes)
    shown = sorted(
        {
            place * (count - 1) // max(min(count, _MOST_FRAMES) - 1, 1)
            for place in range(min(count, _MOST_FRAMES))
        }
    )
    for number, frame in enumerate(video.frames()):
        if number in shown:
            name = f"frame {number + 1} of {count}"
            yield _picture(
                frame, layouts[number], name, room // len(shown), sides=(_FRAME_SIDE, _FRAME_SIDE // 2)
            )


def _picture(
    image: Image.Image, layout: ImageLayout, name: str, room: int, *, sides: Sequence[int] = _SIDES
) -> PictureView:
    grid = layout.grid
    cut = "not cut" if grid is None else f"cut into {grid.columns} x {grid.rows} and an overview"
    source = None
    for side in sides:
        content = thumbnail(image, side)
        if len(content) * _BASE64 <= room:
            source = data_uri(content, "image/webp")
            break
    return PictureView(
        source, *image.size, f"{name}, {image.width} x {image.height} pixels, {cut}", layout.cuts
    )


def _sound(clip: Clip, room: int) -> SoundView:
    """A clip as a PCM16 .wav file, cut to what there is room for."""
    most = min(clip.seconds, _LONGEST_SOUND, (room - _HEADER) / _BASE64 / (2 * RATE))
    caption = f"sound, {clip.seconds:.1f} s"
    if most < min(clip.seconds, _SHORTEST_SOUND):
        return SoundView(None, caption)
    samples = clip.decode()[: int(most * RATE)]
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(RATE)
        writer.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    caption += f", the first {most:.0f} s" if most < clip.seconds else ""
    return SoundView(data_uri(file.getvalue(), "audio/wav"), caption)


def _spectrogram(plan: Plan, processing: Processing, room: int) -> str | None:
    """The log-mel frames of a row's sounds as a data URI; None where the page has no room for it."""
    sheet = spectrogram(processing.finish(plan))
    content = b"" if sheet is None else thumbnail(sheet, _SIDES[0])
    return data_uri(content, "image/webp") if 0 < len(content) * _BASE64 + _HEADER <= room else None

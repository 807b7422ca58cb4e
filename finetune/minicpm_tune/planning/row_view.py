"""A row for a person to look at.

As the model will see it: the prompt as text, and its slices and its log-mel frames as pictures. In a report: its
prompt, its pictures with their cuts and boxes, its sounds, and what is wrong with it.
"""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import PreTrainedTokenizerFast

from minicpm_tune.batch import IGNORE_INDEX, Sample
from minicpm_tune.data.grounding import PixelBox
from minicpm_tune.data.media.audio import RATE, Clip
from minicpm_tune.data.media.images import Picture
from minicpm_tune.data.placeholders import PlaceholderStyle
from minicpm_tune.data.sample_tensors import Plan
from minicpm_tune.data.samples import Processing, TrainingRows
from minicpm_tune.data.slicing.layouts import ImageLayout
from minicpm_tune.errors import RowError
from minicpm_tune.pages.page import data_uri, thumbnail

SUPERVISED = ("[[", "]]")  # what stands around supervised text
_GAP = 8  # pixels between slices
_SHEET_WIDTH = 1600  # pixels
_FRAMES_PER_SECOND = 100
_MEL_RANGE = 2.0  # Whisper's features lie at most so far below the segment's loudest one
_BIN_HEIGHT = 2  # pixels of a mel band
_LABEL_HEIGHT = 14  # pixels
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
class PromptPart:
    """A stretch of a prompt.

    Attributes:
        text: The text; a run of pad tokens is one of them and its count, ``<unk>x64``.
        weight: How much its loss counts; 0 where it is not supervised.
        control: Whether it is made of control tokens.
    """

    text: str
    weight: float = 0.0
    control: bool = False


def prompt_parts(
    ids: Sequence[int], weights: Sequence[float], tokenizer: PreTrainedTokenizerFast, style: PlaceholderStyle
) -> list[PromptPart]:
    """A prompt as text, with what is supervised and what is structure told apart.

    Args:
        ids: Token ids, [T].
        weights: How much the loss of each token counts, 0 where it is not supervised, [T].
        tokenizer: The checkpoint's tokenizer.
        style: How the checkpoint writes images.
    """
    control = tokenizer.added_tokens_decoder
    pads = {tokenizer.convert_tokens_to_ids(pad): pad for pad in (style.pad, style.video_pad)}
    kinds = [
        (weight, number in control, pads.get(number)) for number, weight in zip(ids, weights, strict=True)
    ]
    parts: list[PromptPart] = []
    start = 0
    for (weight, structure, pad), group in groupby(kinds):
        end = start + sum(1 for _ in group)
        text = tokenizer.decode(list(ids[start:end]), clean_up_tokenization_spaces=False)
        parts.append(PromptPart(f"{pad}x{end - start}" if pad else str(text), weight, structure))
        start = end
    return parts


def prompt_text(sample: Sample, tokenizer: PreTrainedTokenizerFast, style: PlaceholderStyle) -> str:
    """The prompt as plain text, supervised text in ``[[ ]]``.

    Supervised text with a weight starts with it: ``[[0.3x Two.]]``.
    """
    labels = sample["labels"]
    weights = (labels != IGNORE_INDEX) * sample.get("loss_weights", torch.ones(len(labels)))
    texts = []
    parts = prompt_parts(sample["input_ids"].tolist(), weights.tolist(), tokenizer, style)
    for weight, group in groupby(parts, key=lambda part: part.weight):
        text = "".join(part.text for part in group)
        before = SUPERVISED[0] if weight == 1 else f"{SUPERVISED[0]}{weight:.3g}x "
        texts.append(f"{before}{text}{SUPERVISED[1]}" if weight else text)
    return "".join(texts)


def slice_images(sample: Sample) -> list[Image.Image]:
    """The sample's slices, put together from their patches."""
    images = []
    for strip, (rows, columns) in zip(patch_strips(sample), sample["tgt_sizes"].tolist(), strict=True):
        side = strip.shape[1]
        pixels = strip.reshape(3, side, rows, columns * side).transpose(2, 1, 3, 0)
        images.append(Image.fromarray(pixels.reshape(rows * side, columns * side, 3)))
    return images


def patch_strips(sample: Sample) -> list[np.ndarray]:
    """Every slice's pixels in patch form, uint8 [3, 14, 14 * L]."""
    lengths = [
        sample["pixel_values"].shape[1] * rows * columns for rows, columns in sample["tgt_sizes"].tolist()
    ]
    return [strip.numpy() for strip in sample["pixel_values"].split(lengths, dim=2)]


def contact_sheet(sample: Sample) -> Image.Image | None:
    """All slices on one sheet, numbered in the order of their placeholders; None for a sample without any."""
    images = slice_images(sample)
    if not images:
        return None
    places, x, y, line = [], _GAP, _GAP, 0
    for image in images:
        if x > _GAP and x + image.width + _GAP > _SHEET_WIDTH:
            x, y, line = _GAP, y + line + _GAP, 0
        places.append((x, y))
        x, line = x + image.width + _GAP, max(line, image.height)
    right = max(place[0] + image.width for place, image in zip(places, images, strict=True))
    sheet = Image.new("RGB", (right + _GAP, y + line + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (place, image) in enumerate(zip(places, images, strict=True)):
        sheet.paste(image, place)
        label = f"{number}: {image.height // 14} x {image.width // 14}"
        box = draw.textbbox(place, label)
        draw.rectangle((box[0], box[1], box[2] + 2, box[3] + 2), fill="black")
        draw.text(place, label, fill="yellow")
    return sheet


def spectrogram(sample: Sample) -> Image.Image | None:
    """The log-mel frames of all audio segments, one strip each with the low bands below; None without audio.

    Dark is loud. A frame of 10 ms is a pixel wide, or less in a segment that would be wider than the sheet. A tick
    stands at every second.
    """
    if "audio_values" not in sample:
        return None
    frames, _, kept = sample["audio_segments"].T.tolist()
    segments = zip(sample["audio_values"].split(frames, dim=1), frames, kept, strict=True)
    strips = [
        _strip(mel.numpy(), f"{number}: {length / _FRAMES_PER_SECOND:.2f} s, {tokens} tokens")
        for number, (mel, length, tokens) in enumerate(segments)
    ]
    height = sum(strip.height + _GAP for strip in strips) + _GAP
    sheet = Image.new("RGB", (max(strip.width for strip in strips) + 2 * _GAP, height), "white")
    y = _GAP
    for strip in strips:
        sheet.paste(strip, (_GAP, y))
        y += strip.height + _GAP
    return sheet


def _strip(mel: np.ndarray, label: str) -> Image.Image:
    """One segment, [80, frames], under its label."""
    darkness = 1 - (mel.max() - mel[::-1]) / _MEL_RANGE
    gray = Image.fromarray((255 * (1 - darkness.clip(0, 1))).astype(np.uint8))
    width, height = min(gray.width, _SHEET_WIDTH), _BIN_HEIGHT * gray.height
    font_width = int(ImageDraw.Draw(gray).textlength(label)) + 1
    strip = Image.new("RGB", (max(width, font_width), _LABEL_HEIGHT + height), "white")
    strip.paste(gray.resize((width, height), Image.Resampling.BOX), (0, _LABEL_HEIGHT))
    draw = ImageDraw.Draw(strip)
    draw.text((0, 0), label, fill="black")
    for second in range(_FRAMES_PER_SECOND, mel.shape[1], _FRAMES_PER_SECOND):
        x = second * width // mel.shape[1]
        draw.line((x, strip.height - 6, x, strip.height), fill="red")
    return strip


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
    """Make the view of a row, of a bad one as far as it goes; its media take at most ``room`` characters."""
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
        view.raw = _raw_text(rows, index)
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
    """The row as it stands in its file, cut where it is long; or why it can't be read."""
    try:
        text = json.dumps(
            rows.mixture.read(index),
            indent=1,
            ensure_ascii=False,
            default=lambda value: f"({len(value)} bytes)" if isinstance(value, bytes) else str(value),
        )
    except RowError as error:
        text = str(error)
    left = len(text) - _LONGEST_PROMPT
    return text if left <= 0 else f"{text[:_LONGEST_PROMPT]}\n... and {left:,} more characters"


def _add_prompt(view: RowView, plan: Plan, processing: Processing) -> None:
    encoded = plan.encoded
    learned = [float(label != IGNORE_INDEX) for label in encoded.labels]
    weights = [one * weight for one, weight in zip(learned, encoded.weights or learned, strict=True)]
    parts = prompt_parts(encoded.input_ids, weights, processing.tokenizer, processing.style)
    view.prompt = shortened(parts, _LONGEST_PROMPT)
    if cut_off := len(plan.pictures) - len(encoded.media_spans):
        note = f"{cut_off} of its images, videos and sounds lie behind the cut at --model_max_length."
        view.notes.append(note)


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
    most = min(count, _MOST_FRAMES)
    shown = {place * (count - 1) // max(most - 1, 1) for place in range(most)}
    for number, frame in enumerate(video.frames()):
        if number in shown:
            name = f"frame {number + 1} of {count}"
            yield _picture(frame, layouts[number], name, room // most, sides=(_FRAME_SIDE, _FRAME_SIDE // 2))


def _picture(
    image: Image.Image, layout: ImageLayout, name: str, room: int, *, sides: Sequence[int] = _SIDES
) -> PictureView:
    grid = layout.grid
    cut = "not cut" if grid is None else f"cut into {grid.columns} x {grid.rows} and an overview"
    contents = (thumbnail(image, side) for side in sides)
    source = next((data_uri(one, "image/webp") for one in contents if len(one) * _BASE64 <= room), None)
    caption = f"{name}, {image.width} x {image.height} pixels, {cut}"
    return PictureView(source, *image.size, caption, layout.cuts)


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

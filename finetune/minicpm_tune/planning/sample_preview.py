"""A sample as the model will see it: the prompt as text, and its slices and its log-mel frames as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import PreTrainedTokenizerFast

from minicpm_tune.batch import IGNORE_INDEX, Sample
from minicpm_tune.data.placeholders import PlaceholderStyle

SUPERVISED = ("[[", "]]")  # what stands around supervised text
_GAP = 8  # pixels between slices
_SHEET_WIDTH = 1600  # pixels
_FRAMES_PER_SECOND = 100
_MEL_RANGE = 2.0  # Whisper's features lie at most so far below the segment's loudest one
_BIN_HEIGHT = 2  # pixels of a mel band
_LABEL_HEIGHT = 14  # pixels


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

    Args:
        sample: The sample.
        tokenizer: The checkpoint's tokenizer.
        style: How the checkpoint writes images.
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
    images, start = [], 0
    side = sample["pixel_values"].shape[1]
    for rows, columns in sample["tgt_sizes"].tolist():
        end = start + side * rows * columns
        strip = sample["pixel_values"][:, :, start:end].numpy()
        pixels = strip.reshape(3, side, rows, columns * side).transpose(2, 1, 3, 0)
        images.append(Image.fromarray(np.ascontiguousarray(pixels.reshape(rows * side, columns * side, 3))))
        start = end
    return images


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
    strips, start = [], 0
    for number, (frames, _, kept) in enumerate(sample["audio_segments"].tolist()):
        mel = sample["audio_values"][:, start : start + frames].numpy()
        strips.append(_strip(mel, f"{number}: {frames / _FRAMES_PER_SECOND:.2f} s, {kept} tokens"))
        start += frames
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

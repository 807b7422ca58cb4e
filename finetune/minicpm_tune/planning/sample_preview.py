"""A sample as the model will see it: the prompt as text, and its slices as one picture."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import PreTrainedTokenizerFast

from minicpm_tune.batch import IGNORE_INDEX, Sample
from minicpm_tune.data.placeholders import PlaceholderStyle

SUPERVISED = ("[[", "]]")  # what stands around supervised text
_GAP = 8  # pixels between slices
_SHEET_WIDTH = 1600  # pixels


def prompt_text(sample: Sample, tokenizer: PreTrainedTokenizerFast, style: PlaceholderStyle) -> str:
    """The prompt with runs of pad tokens folded (``<unk>x64``) and supervised text in ``[[ ]]``.

    Supervised text with a weight starts with it: ``[[0.3x Two.]]``.

    Args:
        sample: The sample.
        tokenizer: The checkpoint's tokenizer.
        style: How the checkpoint writes images.
    """
    ids, labels = sample["input_ids"], sample["labels"]
    counts = (labels != IGNORE_INDEX) * sample.get("loss_weights", torch.ones(len(ids)))
    changes = [0, *(int(place) + 1 for place in (counts[1:] != counts[:-1]).nonzero()[:, 0]), len(ids)]
    parts = []
    for start, end in pairwise(changes):
        text = str(tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))
        weight = float(counts[start])
        start_mark = SUPERVISED[0] if weight == 1 else f"{SUPERVISED[0]}{weight:.3g}x "
        parts.append(f"{start_mark}{text}{SUPERVISED[1]}" if weight else text)
    text = "".join(parts)
    for pad in {style.pad, style.video_pad}:
        text = _folded(text, pad)
    return text


def _folded(text: str, pad: str) -> str:
    """The text with each run of a pad token written as one token and its count."""
    return re.sub(f"(?:{re.escape(pad)} ?)+", lambda run: f"{pad}x{run.group().count(pad)}", text)


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

"""The work of ``inspect_data.py``: looking at every row, or showing single ones."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Generator
from dataclasses import fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageDraw
from transformers import PreTrainedTokenizerFast

from dataset import SupervisedDataset
from minicpm_tune.batch import IGNORE_INDEX, Sample
from minicpm_tune.checkpoints.model_folder import resolve_model_folder
from minicpm_tune.data.placeholders import PlaceholderStyle
from minicpm_tune.data.row_check import for_rows
from minicpm_tune.data.samples import load_processing
from minicpm_tune.errors import DataError, RowError
from minicpm_tune.planning.data_facts import DataFacts, examine, gather
from minicpm_tune.planning.data_report import as_html, as_text, summarize
from minicpm_tune.settings.data_arguments import DataArguments


def inspect(values: argparse.Namespace) -> int:
    """Do what was asked for.

    Args:
        values: The command line of ``inspect_data.py``.

    Returns:
        How many rows can't be used; with ``--show``, how many of those shown.
    """
    rows = open_data(values)
    if values.show:
        return sum(not show(rows, index) for index in values.show)
    found, summary = survey(rows, values)
    sys.stdout.write(as_text(summary, found) + "\n")
    if values.report:
        Path(values.report).write_text(as_html(summary, found, rows), encoding="utf-8")
    return len(found.bad)


def open_data(values: argparse.Namespace) -> SupervisedDataset:
    """Open the rows with what the checkpoint says about text and images."""
    given = {one.name: getattr(values, one.name) for one in fields(DataArguments) if one.name in values}
    arguments = DataArguments(**{**given, "model_max_length": values.model_max_length or None})
    folder = resolve_model_folder(values.model_name_or_path, cache_dir=values.cache_dir, weights=False)
    return SupervisedDataset(values.data_path, load_processing(folder, arguments))


def survey(rows: SupervisedDataset, values: argparse.Namespace) -> tuple[DataFacts, dict[str, Any]]:
    """Look at every row, and write the JSON file on the way when one is wanted."""
    look = partial(examine, decode=values.check_images != "header", details=values.json is not None)
    facts = for_rows(rows, range(rows.mixture.row_count), look, title="inspecting", workers=values.workers)
    if values.json is None:
        found = gather(facts, rows, write=None)
        return found, summarize(found, rows, batch_size=values.per_device_train_batch_size)
    with open(values.json, "w", encoding="utf-8") as file:
        writer = _row_writer(file)
        next(writer)
        found = gather(facts, rows, write=writer.send)
        summary = summarize(found, rows, batch_size=values.per_device_train_batch_size)
        file.write(f'\n], "summary": {json.dumps(summary)}}}\n')
    return found, summary


def _row_writer(file: IO[str]) -> Generator[None, str, None]:
    """Write rows into a JSON list as they come; one line is sent at a time."""
    file.write('{"rows": [\n')
    file.write((yield))
    while True:
        file.write(",\n" + (yield))


def show(rows: SupervisedDataset, index: int) -> bool:
    """Print a row as the model will see it, and draw its slices.

    Returns:
        Whether it can be used.

    Raises:
        DataError: When there is no such row.
    """
    if not 0 <= index < rows.mixture.row_count:
        raise DataError(
            f"--show {index}: found {rows.mixture.row_count} rows, expected a number below that, from 0 on."
        )
    processing = rows.processing
    try:
        sample = processing.finish(rows.plan(index))
    except RowError as error:
        sys.stdout.write(f"{rows.describe(index, error)}\n")
        return False
    supervised = int((sample["labels"] != IGNORE_INDEX).sum())
    sizes = ", ".join(f"{height} x {width}" for height, width in sample["tgt_sizes"].tolist())
    sys.stdout.write(
        f"--- row {index}: {len(sample['input_ids'])} tokens, {supervised} supervised, "
        f"{len(sample['tgt_sizes'])} slices{sizes and f' ({sizes} patches)'}\n"
        f"{prompt_text(sample, processing.tokenizer, processing.style)}\n"
    )
    sheet = contact_sheet(sample)
    if sheet is not None:
        path = Path(f"sample_{index}.png")
        sheet.save(path)
        sys.stdout.write(f"slices: {path}\n")
    return True


LEARNED = ("[[", "]]")  # what stands around supervised text
_GAP = 8
_SHEET_WIDTH = 1600


def prompt_text(sample: Sample, tokenizer: PreTrainedTokenizerFast, style: PlaceholderStyle) -> str:
    """The prompt with runs of pad tokens folded (``<unk>x64``) and supervised text in ``[[ ]]``.

    Args:
        sample: The sample.
        tokenizer: The checkpoint's tokenizer.
        style: How the checkpoint writes images.
    """
    ids, labels = sample["input_ids"], sample["labels"]
    learned = labels != IGNORE_INDEX
    changes = [0, *(int(place) + 1 for place in (learned[1:] != learned[:-1]).nonzero()[:, 0]), len(ids)]
    parts = []
    for start, end in pairwise(changes):
        text = str(tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))
        parts.append(f"{LEARNED[0]}{text}{LEARNED[1]}" if learned[start] else text)
    text = "".join(parts)
    for pad in {style.pad, style.video_pad}:
        text = _folded(text, pad)
    return text


def _folded(text: str, pad: str) -> str:
    """The text with runs of a pad token written as one token and its count."""
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
    """All slices on one sheet, numbered in the order of their placeholders; ``None`` without any."""
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

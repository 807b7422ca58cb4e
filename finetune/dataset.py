"""Rows -> samples -> batches: ``SupervisedDataset`` and ``data_collator``.

Shapes: T is a sample's length in tokens, B the samples of a batch, S all its slices, P those with a
placeholder, L a slice's patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from conversation import IGNORE_INDEX
from image_files import check_source, open_image
from processing import Processing, Sample
from records import Conversation, RowError, parse_row
from row_files import DataError, Rows, open_rows

SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class DataOptions:
    """How rows become samples; the names are those of the command line.

    Attributes:
        model_max_length: Longest sequence, in tokens, image placeholders included.
        image_folder: What relative image paths are relative to; ``None`` means the data file's folder.
        allow_remote_images: Whether http(s) images are fetched.
    """

    model_max_length: int = 2048
    image_folder: str | None = None
    allow_remote_images: bool = False


class SupervisedDataset(Dataset):
    """The rows of a data file as training samples.

    Args:
        data_path: The data file.
        processing: The checkpoint's ``Processing``.
        options: Length limit and where images are.
    """

    def __init__(self, data_path: str | Path, processing: Processing, options: DataOptions | None = None) -> None:
        self.rows: Rows = open_rows(data_path)
        self.processing = processing
        self.options = options or DataOptions()
        self.folder = Path(self.options.image_folder or self.rows.path.parent)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        try:
            return self._sample(index)
        except RowError as error:
            raise DataError(self._place(index, error)) from error

    def _sample(self, index: int) -> Sample:
        conversation = self._conversation(index)
        images = [
            open_image(source.value, self.folder, allow_remote=self.options.allow_remote_images)
            for source in conversation.sources
        ]
        sample = self.processing.encode(conversation.turns, images, limit=self.options.model_max_length)
        if not (sample["labels"][1:] != IGNORE_INDEX).any():
            raise RowError(
                "nothing to learn",
                f"none of its {self.options.model_max_length} tokens is supervised, expected an answer. "
                "Shorten the row, or raise --model_max_length.",
            )
        return {**sample, "row": index, "source": 0}

    def _conversation(self, index: int) -> Conversation:
        conversation = parse_row(self.rows[index])
        for number, turn in enumerate(conversation.turns):
            token = self.processing.writer.find_control_token(turn.text)
            if token:
                raise RowError(
                    "control token",
                    f"turn {number} contains {token!r}, which the model reads as structure, expected text. "
                    "Remove it or write it in another way.",
                )
        return conversation

    def check_rows(self) -> None:
        """See that every row can be used, before a model is loaded; images are looked for, not read.

        Raises:
            DataError: With the first twenty problems and their number.
        """
        problems: list[str] = []
        for index in range(len(self.rows)):
            try:
                for source in self._conversation(index).sources:
                    check_source(source.value, self.folder, allow_remote=self.options.allow_remote_images)
            except RowError as error:
                problems.append(self._place(index, error))
            except DataError as error:
                problems.append(str(error))
        if problems:
            raise DataError(_summary(problems, len(self.rows)))

    def _place(self, index: int, error: RowError) -> str:
        row = self.rows[index]
        row_id = row.get("id") if isinstance(row, dict) else None
        name = f" (id {row_id!r})" if row_id is not None else ""
        return f"{self.rows.path}: row {index}{name}: {error}"


def padding_sample(processing: Processing) -> Sample:
    """A sample that contributes nothing: one token, not supervised, no image."""
    ids = torch.tensor([processing.tokenizer.convert_tokens_to_ids(processing.generation.turn_end)])
    sample: Sample = {
        "input_ids": ids,
        "labels": torch.full_like(ids, IGNORE_INDEX),
        "pixel_values": torch.zeros((3, processing.rules.patch_size, 0), dtype=torch.uint8),
        "tgt_sizes": torch.zeros((0, 2), dtype=torch.int32),
        "image_bound": torch.zeros((0, 2), dtype=torch.int64),
        "row": None,
        "source": None,
    }
    if processing.generation.name == "v4_7":
        sample["mm_token_type_ids"] = torch.zeros_like(ids)
    return sample


def _summary(problems: Sequence[str], total: int) -> str:
    shown = "\n".join(f"  {problem}" for problem in problems[:SHOWN_PROBLEMS])
    more = f"\n  ... and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    return f"{len(problems)} of {total} rows can't be used:\n{shown}{more}"


def data_collator(samples: Sequence[Sample], *, pad_token_id: int = 0) -> dict[str, Any]:
    """Join samples into a batch.

    Args:
        samples: What ``SupervisedDataset`` gives.
        pad_token_id: What ``input_ids`` are padded with; any valid id, since padding is never attended.

    Returns:
        ``input_ids``, ``labels``, ``attention_mask``, ``position_ids`` [B, T], padded on the right;
        ``pixel_values`` uint8 [3, 14, 14 * sum(L)], ``tgt_sizes`` [S, 2], ``image_bound`` [P, 3] = (row,
        start, end), of the whole batch; ``rows``, the (source, row) of every sample, ``None`` for one that contributes nothing.
    """
    length = max(len(sample["input_ids"]) for sample in samples)
    batch: dict[str, Any] = {
        "input_ids": _padded(samples, "input_ids", length, pad_token_id),
        "labels": _padded(samples, "labels", length, IGNORE_INDEX),
        "attention_mask": torch.zeros(len(samples), length, dtype=torch.int64),
        "position_ids": torch.zeros(len(samples), length, dtype=torch.int64),
    }
    bounds = []
    for row, sample in enumerate(samples):
        count = len(sample["input_ids"])
        batch["attention_mask"][row, :count] = 1
        batch["position_ids"][row, :count] = torch.arange(count)
        batch["position_ids"][row, count:] = torch.arange(length - count)
        bound = sample["image_bound"]
        bounds.append(torch.cat([torch.full((len(bound), 1), row, dtype=torch.int64), bound], dim=1))
    batch["pixel_values"] = torch.cat([sample["pixel_values"] for sample in samples], dim=2)
    batch["tgt_sizes"] = torch.cat([sample["tgt_sizes"] for sample in samples])
    batch["image_bound"] = torch.cat(bounds)
    if "mm_token_type_ids" in samples[0]:
        batch["mm_token_type_ids"] = _padded(samples, "mm_token_type_ids", length, 0)
    batch["rows"] = [None if sample.get("row") is None else (sample["source"], sample["row"]) for sample in samples]
    return batch


def _padded(samples: Sequence[Sample], key: str, length: int, value: int) -> torch.Tensor:
    padded = torch.full((len(samples), length), value, dtype=torch.int64)
    for row, sample in enumerate(samples):
        padded[row, : len(sample[key])] = sample[key]
    return padded

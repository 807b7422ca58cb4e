"""Samples -> a batch, in one place: packed rows, single rows, and prompts for generation.

Shapes and letters as in ``minicpm_tune/batch.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from minicpm_tune.batch import IGNORE_INDEX, Batch, PictureFeatures, Provenance, Sample, SliceSources


@dataclass(frozen=True)
class _Placed:
    """A sample with its place in the batch: ``row``, and [start, end) in tokens of that row."""

    sample: Sample
    row: int
    start: int

    @property
    def span(self) -> tuple[int, slice]:
        return self.row, slice(self.start, self.start + len(self.sample["input_ids"]))


def data_collator(
    rows: Sequence[Sample | list[Sample]],
    *,
    pad_token_id: int = 0,
    packing: bool = False,
    padding_side: Literal["right", "left"] = "right",
) -> Batch:
    """Make a batch.

    Args:
        rows: What ``SupervisedDataset`` gives; a list of samples shares one row. Samples may be prompts.
        pad_token_id: What ``input_ids`` are padded with; any valid id, since padding is never attended.
        packing: Whether rows may hold several samples; the model then tells them apart by ``position_ids``.
        padding_side: ``right`` for training; ``left`` for generation, so that the prompts end side by side.

    Returns:
        The batch, with the keys that ``Batch`` lists.
    """
    placed, shape = _place(rows, padding_side)
    samples = [each.sample for each in placed]
    batch: Batch = {
        "input_ids": _spread(placed, shape, pad_token_id, lambda sample: sample["input_ids"]),
        "attention_mask": _spread(placed, shape, 0, lambda sample: 1),
        "pixel_values": torch.cat([sample["pixel_values"] for sample in samples], dim=2),
        "tgt_sizes": torch.cat([sample["tgt_sizes"] for sample in samples]).numpy(),
        "image_bound": _bounds(placed, "image_bound"),
    }
    if "mm_token_type_ids" in samples[0]:
        batch["mm_token_type_ids"] = _spread(placed, shape, 0, lambda sample: sample["mm_token_type_ids"])
    if any("temporal_ids" in sample for sample in samples):
        batch["temporal_ids"] = _temporal_ids(samples)
    heard = [each for each in placed if "audio_values" in each.sample]
    if heard:
        batch["audio_values"] = torch.cat([each.sample["audio_values"] for each in heard], dim=1)
        batch["audio_segments"] = torch.cat([each.sample["audio_segments"] for each in heard]).numpy()
        batch["audio_bound"] = _bounds(heard, "audio_bound")
    if packing:
        batch["position_ids"] = _position_ids(placed, shape)
    if "labels" in samples[0]:
        copied = [batch["input_ids"], batch["attention_mask"], *([batch["position_ids"]] if packing else [])]
        batch["on_cpu"] = torch.stack(copied).numpy()
        batch["labels"] = _labels(placed, shape)
        batch["supervised"] = supervised_places(batch["labels"])
        batch["provenance"] = _provenance(placed, shape, batch["supervised"])
        if any("loss_weights" in sample for sample in samples):
            batch["loss_weights"] = _loss_weights(placed, shape, batch["supervised"])
    if any("pictures" in sample for sample in samples):
        pictures = [picture for sample in samples for picture in sample.get("pictures", ())]
        batch["slice_sources"] = _slice_sources(pictures)
        known = [picture.features for picture in pictures if picture.features is not None]
        if known:
            batch["known_features"] = torch.cat(known)
    return batch


def _place(rows: Sequence[Sample | list[Sample]], padding_side: str) -> tuple[list[_Placed], tuple[int, int]]:
    """Give every sample its place, and the batch its shape [B, T]."""
    lists = [row if isinstance(row, list) else [row] for row in rows]
    lengths = [sum(len(sample["input_ids"]) for sample in row) for row in lists]
    width = max(lengths)
    placed = []
    for number, (row, length) in enumerate(zip(lists, lengths, strict=True)):
        start = width - length if padding_side == "left" else 0
        for sample in row:
            placed.append(_Placed(sample, number, start))
            start += len(sample["input_ids"])
    return placed, (len(rows), width)


def _spread(
    placed: Sequence[_Placed],
    shape: tuple[int, int],
    fill: int,
    value: Callable[[Sample], Any],
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """[B, T] with a value of every sample at its tokens, and ``fill`` elsewhere."""
    values = torch.full(shape, fill, dtype=dtype)
    for each in placed:
        values[each.span] = value(each.sample)
    return values


def _position_ids(placed: Sequence[_Placed], shape: tuple[int, int]) -> Tensor:
    """[B, T] positions that restart with every sample; the padding behind them counts as one more."""
    starts = torch.zeros(shape, dtype=torch.int64)
    for each in placed:
        row, span = each.span
        starts[row, span] = span.start
        starts[row, span.stop :] = span.stop
    return torch.arange(shape[1]) - starts


def _labels(placed: Sequence[_Placed], shape: tuple[int, int]) -> Tensor:
    labels = _spread(placed, shape, IGNORE_INDEX, lambda sample: sample["labels"])
    for each in placed:
        # Nothing predicts the first token of a sample; in a packed row the token before belongs to another.
        labels[each.row, each.start] = IGNORE_INDEX
    return labels


def _bounds(placed: Sequence[_Placed], key: Literal["image_bound", "audio_bound"]) -> np.ndarray:
    """[runs, 3] (row, start, end) of one key of every sample."""
    bounds = [
        torch.nn.functional.pad(each.sample[key] + each.start, (1, 0), value=each.row) for each in placed
    ]
    return torch.cat(bounds).numpy()


def supervised_places(labels: Tensor) -> np.ndarray:
    """Places in the flattened batch whose next token has a label.

    Example:
        >>> supervised_places(torch.tensor([[-100, 5, -100], [-100, -100, 7]])).tolist()
        [0, 4]
    """
    rows, columns = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    return (rows * labels.shape[1] + columns).numpy()


def _provenance(placed: Sequence[_Placed], shape: tuple[int, int], supervised: np.ndarray) -> Provenance:
    sources = _spread(placed, shape, -1, lambda sample: (sample.get("origin") or (-1,))[0])
    return Provenance([each.sample.get("origin") for each in placed], sources.numpy().ravel()[supervised])


def _loss_weights(placed: Sequence[_Placed], shape: tuple[int, int], supervised: np.ndarray) -> np.ndarray:
    """[N] how much each supervised token counts; 1 in samples that do not say."""
    weights = _spread(placed, shape, 1, lambda sample: sample.get("loss_weights", 1), torch.float32)
    return weights.numpy().ravel()[supervised + 1]


def _temporal_ids(samples: Sequence[Sample]) -> np.ndarray:
    """[S, 2] (run, time index); runs are counted through the batch, and a still's slices have their own."""
    counted, first = [], 0
    for sample in samples:
        runs = len(sample["image_bound"])
        stills = torch.stack([torch.arange(runs), torch.full((runs,), -1)], dim=1)
        counted.append(sample.get("temporal_ids", stills) + torch.tensor([first, 0]))
        first += runs
    return torch.cat(counted).numpy()


def _slice_sources(pictures: Sequence[PictureFeatures]) -> SliceSources:
    known = np.array([picture.features is not None for picture in pictures], dtype=bool)
    unknown = [(picture.key, picture.slices) for picture in pictures if picture.features is None]
    return SliceSources(np.repeat(known, [picture.slices for picture in pictures]), unknown)

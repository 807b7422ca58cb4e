"""Samples -> a batch: ``data_collator``.

Shapes: B samples of at most T tokens, S slices of the whole batch, P their runs of pad tokens, L a slice's
patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from minicpm_tune.data.samples import Sample
from minicpm_tune.data.token_labels import IGNORE_INDEX
from minicpm_tune.models.tower_features import for_the_model, joined


def data_collator(samples: Sequence[Sample], *, pad_token_id: int = 0) -> dict[str, Any]:
    """Join samples into a batch.

    Args:
        samples: What ``SupervisedDataset`` gives; prompts without ``labels`` work, too.
        pad_token_id: What ``input_ids`` are padded with; any valid id, since padding is never attended.

    Returns:
        ``input_ids``, ``labels``, ``attention_mask``, ``position_ids`` [B, T], padded on the right, positions
        restarting at 0 with the padding; ``pixel_values`` uint8 [3, 14, 14 * sum(L)], ``tgt_sizes`` [S, 2],
        ``image_bound`` [P, 3] = (row, start, end) of the whole batch; with packed video frames
        ``temporal_ids`` [S, 2] = (run of pad tokens, time index or -1); ``rows``, the (source, row) of every
        sample, ``None`` for one that contributes nothing. Where features of slices are kept (``known_slices``)
        ``slice_sources`` and ``known_features``, and ``pixel_values`` of the other slices alone.
    """
    length = max(len(sample["input_ids"]) for sample in samples)
    fills = {"input_ids": pad_token_id, "labels": IGNORE_INDEX, "mm_token_type_ids": 0}
    batch: dict[str, Any] = {
        key: _padded([sample[key] for sample in samples], length, fill)
        for key, fill in fills.items()
        if key in samples[0]
    }
    counts = torch.tensor([len(sample["input_ids"]) for sample in samples])[:, None]
    places = torch.arange(length)[None]
    batch["attention_mask"] = (places < counts).long()
    batch["position_ids"] = torch.where(places < counts, places, places - counts)
    batch["pixel_values"] = torch.cat([sample["pixel_values"] for sample in samples], dim=2)
    batch["tgt_sizes"] = torch.cat([sample["tgt_sizes"] for sample in samples])
    batch["image_bound"] = torch.cat(
        [
            torch.nn.functional.pad(sample["image_bound"], (1, 0), value=row)
            for row, sample in enumerate(samples)
        ]
    )
    if any("temporal_ids" in sample for sample in samples):
        batch["temporal_ids"] = temporal_ids(samples)
    for pictures in joined(samples).values():
        batch |= for_the_model(pictures)
    batch["rows"] = [
        None if sample.get("row") is None else (sample["source"], sample["row"]) for sample in samples
    ]
    return batch


def _padded(rows: Sequence[torch.Tensor], length: int, fill: int) -> torch.Tensor:
    padded = torch.full((len(rows), length), fill, dtype=torch.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded


def temporal_ids(samples: Sequence[Sample]) -> torch.Tensor:
    """Every slice's run, counted through the batch, and its time index; a still's slices have their own."""
    parts = []
    first = 0
    for sample in samples:
        runs = len(sample["image_bound"])
        times = sample.get("temporal_ids")
        if times is None:
            times = torch.stack([torch.arange(runs), torch.full((runs,), -1)], dim=1)
        parts.append(times + torch.tensor([first, 0]))
        first += runs
    return torch.cat(parts)

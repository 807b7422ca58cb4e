"""Packing: several samples share one row, so that few places of a row are padding.

Samples are put together by their lengths, longest first, each into the fullest row it still fits
(best fit), within a window of the shuffled order. Attention, recurrent state and positions stay
within a sample; the model tells samples apart by ``position_ids`` that restart at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from minicpm_tune.data.collating import temporal_ids
from minicpm_tune.models.loss import IGNORE_INDEX
from minicpm_tune.models.tower_features import joined as joined_pictures

Sample = dict[str, Any]


def best_fit(indices: Sequence[int], lengths: Sequence[int], *, capacity: int) -> list[tuple[int, ...]]:
    """Put samples into as few rows as best fit, longest first, finds.

    Args:
        indices: The samples' numbers.
        lengths: Length of every sample of the data set, by number, in tokens.
        capacity: Longest row, in tokens. A longer sample gets a row of its own.

    Returns:
        Rows, each the numbers of its samples; every index is in exactly one.

    Example:
        >>> best_fit([0, 1, 2, 3], [60, 50, 40, 50], capacity=100)
        [(0, 2), (1, 3)]
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free tokens -> rows that have so many
    occupied = 0  # bit n is set while with_room[n] has a row; its lowest bits are found in one step
    for index in sorted(indices, key=lambda index: -lengths[index]):
        # int(): a numpy length would turn the bit mask into a 64-bit number.
        length = min(int(lengths[index]), capacity)
        fitting = occupied >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                occupied &= ~(1 << room)
            rows[row].append(index)
        else:
            room, row = capacity, len(rows)
            rows.append([index])
        left = room - length
        if left:
            with_room.setdefault(left, []).append(row)
            occupied |= 1 << left
    return [tuple(row) for row in rows]


def pack_in_windows(
    order: Sequence[int], lengths: Sequence[int], *, capacity: int, window: int
) -> list[tuple[int, ...]]:
    """Pack a shuffled order, window by window.

    Args:
        order: Numbers of the samples, shuffled.
        lengths: See ``best_fit``.
        capacity: See ``best_fit``.
        window: Samples that are put together at a time.
    """
    starts = range(0, len(order), window)
    return [
        row for start in starts for row in best_fit(order[start : start + window], lengths, capacity=capacity)
    ]


def join(samples: Sequence[Sample]) -> Sample:
    """Join the samples of a packed row to one.

    Args:
        samples: As ``SupervisedDataset`` gives them.

    Returns:
        A sample whose ``position_ids`` [T] restart at 0 with each of its parts, and whose ``parts`` are
        the (source, row) of each, None for one that contributes nothing.
    """
    joined: Sample = {}
    for key in ("input_ids", "labels", "mm_token_type_ids"):
        if key in samples[0]:
            joined[key] = torch.cat([sample[key] for sample in samples])
    joined["pixel_values"] = torch.cat([sample["pixel_values"] for sample in samples], dim=2)
    joined["tgt_sizes"] = torch.cat([sample["tgt_sizes"] for sample in samples])
    joined["position_ids"] = torch.cat([torch.arange(len(sample["input_ids"])) for sample in samples])
    bounds, start = [], 0
    for sample in samples:
        # Nothing predicts the first token of a sample; the token before it belongs to another.
        joined["labels"][start] = IGNORE_INDEX
        bounds.append(sample["image_bound"] + start)
        start += len(sample["input_ids"])
    joined["image_bound"] = torch.cat(bounds)
    if any("temporal_ids" in sample for sample in samples):
        joined["temporal_ids"] = temporal_ids(samples)
    joined["parts"] = [
        None if sample["row"] is None else (sample["source"], sample["row"]) for sample in samples
    ]
    joined |= joined_pictures(samples)
    joined |= {"row": samples[0]["row"], "source": samples[0]["source"]}
    return joined

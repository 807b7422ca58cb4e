"""The order of rows in an epoch: shuffled from the seed, the same on any number of ranks.

Ranks take their batches from one common order. So that every rank runs the same number of equally
filled steps without any row counting twice, the order is filled up with ``PADDING``, which the
dataset turns into samples that contribute nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from loss import IGNORE_INDEX

PADDING = -1


class EpochSampler(Sampler):
    """Row numbers of one epoch.

    Args:
        count: Rows in the data set.
        multiple: The order's length is filled up to a multiple of this (ranks x batch size).
        seed: Together with the epoch it decides the order.
        shuffle: False keeps the file's order (evaluation).
    """

    def __init__(self, count: int, *, multiple: int, seed: int = 0, shuffle: bool = True):
        self.count, self.multiple, self.seed, self.shuffle = count, multiple, seed, shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.count // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.count, generator=generator).tolist()
        else:
            order = list(range(self.count))
        yield from order
        yield from [PADDING] * (len(self) - self.count)


class PaddedRows(Dataset):
    """A data set that answers ``PADDING`` with a sample without supervised tokens.

    Args:
        rows: The data set.
        padding: The sample to give for ``PADDING``.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], padding: dict[str, Any]):
        self.rows, self.padding = rows, padding

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.padding if index == PADDING else self.rows[index]


def padding_sample(pad_token_id: int, *, token_types: bool) -> dict[str, Any]:
    """A sample of two tokens without images and without supervised tokens.

    Args:
        pad_token_id: Its tokens.
        token_types: Whether samples of this generation have ``mm_token_type_ids``.
    """
    sample = {
        "input_ids": torch.full((2,), pad_token_id),
        "labels": torch.full((2,), IGNORE_INDEX),
        "pixel_values": torch.zeros(3, 14, 0, dtype=torch.uint8),
        "tgt_sizes": torch.zeros(0, 2, dtype=torch.int32),
        "image_bound": torch.zeros(0, 2, dtype=torch.int64),
        "source": 0,
        "row": PADDING,
    }
    if token_types:
        sample["mm_token_type_ids"] = torch.zeros(2, dtype=torch.int64)
    return sample

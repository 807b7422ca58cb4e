"""Which samples an epoch's rows are made of: their order on any number of ranks, and packing several into a row.

Ranks take their batches from one common order. So that every rank runs the same number of equally
filled steps without any row counting twice, the order is filled up with ``PADDING``, which the
dataset turns into samples that contribute nothing.

Packed samples are put together by their lengths, longest first, each into the fullest row it still fits
(best fit), within a window of the shuffled order. Attention, recurrent state and positions stay
within a sample; the model tells samples apart by ``position_ids`` that restart at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from minicpm_tune.batch import Sample
from minicpm_tune.data.files.mixtures import Mixture

PADDING = -1
Order = Callable[[int], list[int]]


def grouped_by_length(order: Order, lengths: Lengths, *, batch_size: int, seed: int) -> Order:
    """An order in which rows of about equal length are neighbors, so that batches need little padding.

    Args:
        order: Which rows an epoch holds.
        lengths: Tokens of every row, those of images included, by row number.
        batch_size: Rows that go through the model together, on all ranks.
        seed: Together with the epoch it decides the order.
    """

    def grouped(epoch: int) -> list[int]:
        rows = order(epoch)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        places = get_length_grouped_indices([lengths[row] for row in rows], batch_size, generator=generator)
        return [rows[place] for place in places]

    return grouped


def epoch_order(mixture: Mixture, *, seed: int, shuffle: bool) -> Order:
    """The order of a mixture's rows, by epoch."""
    return lambda epoch: mixture.epoch_order(seed=seed, epoch=epoch, shuffle=shuffle)


class EpochSampler(Sampler):
    """Row numbers of one epoch, filled up to full steps.

    Args:
        order: Epoch -> row numbers, as many in every epoch.
        multiple: The length is filled up to a multiple of this (ranks x batch size).
    """

    def __init__(self, order: Order, *, multiple: int):
        self.order, self.multiple = order, multiple
        self.epoch = 0
        self.count = len(order(0))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.count // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[Any]:
        entries = self.entries(self.epoch)
        yield from entries
        yield from [PADDING] * (len(self) - len(entries))

    def entries(self, epoch: int) -> list[Any]:
        """What the epoch holds, padding not included."""
        return self.order(epoch)


class PackingSampler(EpochSampler):
    """Rows of several samples each, as tuples of row numbers.

    The number of packed rows may differ a little from epoch to epoch, but a run needs the same number
    of steps in each. It is settled by the first epoch's plan and by that of one window over all
    samples, which does not depend on the order; an epoch whose plan needs more rows takes the latter.

    Args:
        order: See ``EpochSampler``.
        multiple: See ``EpochSampler``.
        lengths: Tokens of every sample, by row number.
        capacity: Longest packed row, in tokens (``--model_max_length``).
        window: Samples put together at a time (``--packing_window``).
        seed: Together with the epoch it decides the order of packed rows.
    """

    def __init__(
        self, order: Order, *, multiple: int, lengths: Lengths, capacity: int, window: int, seed: int
    ):
        super().__init__(order, multiple=multiple)
        self.lengths, self.capacity, self.window, self.seed = lengths, capacity, window, seed
        whole = best_fit(order(0), lengths, capacity=capacity)
        self.count = max(len(whole), len(self._plan(0)))

    def entries(self, epoch: int) -> list[tuple[int, ...]]:
        rows = self._plan(epoch)
        if len(rows) > self.count:
            rows = best_fit(self.order(epoch), self.lengths, capacity=self.capacity)
        mixed = torch.randperm(
            len(rows), generator=torch.Generator().manual_seed(self.seed * 999_983 + epoch)
        )
        return [rows[place] for place in mixed.tolist()]

    def _plan(self, epoch: int) -> list[tuple[int, ...]]:
        return pack_in_windows(self.order(epoch), self.lengths, capacity=self.capacity, window=self.window)


class PaddedRows(Dataset):
    """A data set that answers ``PADDING`` with a sample without supervised tokens, and tuples with lists.

    Args:
        rows: The ``SupervisedDataset``.
        padding: The sample to give for ``PADDING``.
    """

    def __init__(self, rows: Any, padding: Sample):
        self.rows, self.padding = rows, padding

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | tuple[int, ...]) -> Sample | list[Sample]:
        if isinstance(index, tuple):
            return [self.rows[number] for number in index]
        return self.padding if index == PADDING else self.rows[index]


Lengths = Sequence[int] | np.ndarray  # tokens of every sample, by number


def best_fit(indices: Sequence[int], lengths: Lengths, *, capacity: int) -> list[tuple[int, ...]]:
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
    order: Sequence[int], lengths: Lengths, *, capacity: int, window: int
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

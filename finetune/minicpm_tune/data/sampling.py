"""Which rows are used, and how: those held out of training, an epoch's order on any number of ranks, and packing.

``--eval_split``: rows that share an image, a video or an audio, directly or through other rows, are a group, and a
group stays on one side. The side follows from a hash of the seed and of the group's media alone. So every process and
a resumed run come to the same rows, and with a fraction a row keeps its side when rows are added or put in another
order; a permutation would deal all of them anew. Only a new row that ties two groups together can move one.

Ranks take their batches from one common order. So that every rank runs the same number of equally filled steps
without any row counting twice, the order is filled up with ``PADDING``, for which the dataset gives samples that
contribute nothing.

Packed samples are put together by their lengths, longest first, each into the fullest row it still fits (best fit),
within a window of the shuffled order. Attention, recurrent state and positions stay within a sample; the model tells
samples apart by ``position_ids`` that restart at 0.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from minicpm_tune import processes
from minicpm_tune.batch import Sample
from minicpm_tune.data.media.sources import fingerprint
from minicpm_tune.data.row_check import for_rows
from minicpm_tune.data.samples import TrainingRows
from minicpm_tune.errors import DataError, RowError

logger = logging.getLogger(__name__)

PADDING = -1
Order = Callable[[int], list[int]]
Lengths = Sequence[int] | np.ndarray  # tokens of every sample, by number
_SIZE = 8  # bytes of a hash: two of a million pictures are alike with a chance of 1 to 37 million


def held_out_rows(rows: TrainingRows, share: float, *, seed: int) -> np.ndarray:
    """Choose the evaluation's rows.

    Args:
        rows: All rows, checked; those that were left out stay with the training, where they contribute nothing.
        share: A fraction below 1 of the groups, or a number of rows.
        seed: Decides which, together with the rows' media.

    Returns:
        Whether a row is held out, bool ``[row_count]``; the same on every process.

    Raises:
        DataError: When nothing would be left on one of the sides.
    """
    media = _shared_identities(rows)
    usable = [index for index, found in enumerate(media) if found and index not in rows.left_out]
    group_of = group_rows([media[index] for index in usable])
    sizes = Counter(group_of)
    if len(sizes) < 2:
        raise DataError(
            f"--eval_split {share:g}: found {len(usable)} rows that can be used, in {len(sizes)} group, expected at "
            "least two groups: rows that share a picture can't be divided. Give --eval_data_path instead."
        )
    chosen = choose_groups(sizes, share, seed=seed)
    held_out = np.zeros(rows.mixture.row_count, dtype=bool)
    held_out[[index for index, group in zip(usable, group_of, strict=True) if group in chosen]] = True
    logger.info(
        "--eval_split %g (seed %d): %s of %s rows are held out of training, %s of %s groups that share no picture.",
        share, seed, f"{held_out.sum():,}", f"{len(usable):,}", f"{len(chosen):,}", f"{len(sizes):,}",
    )  # fmt: skip
    return held_out


def group_rows(media: Sequence[Sequence[int]]) -> list[int]:
    """Give rows that share a medium, directly or through others, one group.

    Args:
        media: The hashes of each row's media, at least one.

    Returns:
        Each row's group: the smallest hash in it.

    Example:
        >>> group_rows([[5], [7, 5], [9], [7]])
        [5, 5, 9, 5]
    """
    above: dict[int, int] = {}

    def top(value: int) -> int:
        while (upper := above.setdefault(value, value)) != value:
            above[value] = above[upper]  # halves the way for the next
            value = upper
        return value

    for first, *others in media:
        for other in others:
            low, high = sorted((top(first), top(other)))
            above[high] = low
    return [top(first) for first, *_ in media]


def choose_groups(sizes: Mapping[int, int], share: float, *, seed: int) -> set[int]:
    """Choose groups by the place that the seed gives each between 0 and 1.

    Args:
        sizes: Rows of each group.
        share: Below 1 the groups whose place is below it, at least the first one; else groups in the order of their
            places while their rows are no more than this.
        seed: Decides the places.

    Raises:
        DataError: When no group is small enough, or none would be left.
    """
    places = {group: _hash(f"{seed}|{group}".encode()) / 2 ** (8 * _SIZE) for group in sizes}
    in_order = sorted(sizes, key=places.__getitem__)
    if share < 1:
        chosen = {group for group in in_order if places[group] < share} or set(in_order[:1])
    else:
        chosen, left = set(), share
        for group in in_order:
            if sizes[group] <= left:
                chosen.add(group)
                left -= sizes[group]
    rows = sum(sizes.values())
    if not chosen or len(chosen) == len(sizes):
        side = "evaluation" if not chosen else "training"
        raise DataError(
            f"--eval_split {share:g}: found {rows} rows in {len(sizes)} groups that share no picture (the largest has "
            f"{max(sizes.values())} rows), which leaves none for the {side}. Choose another share, or give "
            "--eval_data_path."
        )
    return chosen


def first_of_each_file(held_out: np.ndarray, ends: Sequence[int], most: int | None) -> np.ndarray:
    """Keep at most so many of the held-out rows of each file; ``ends`` are the numbers behind each file's last row."""
    if most is None:
        return held_out
    kept = held_out.copy()
    for start, end in zip((0, *ends), ends, strict=False):
        kept[start + np.flatnonzero(held_out[start:end])[most:]] = False
    return kept


def _shared_identities(rows: TrainingRows) -> list[tuple[int, ...]]:
    """The hashes of every row's media, each process reading its share of the rows."""
    rank, ranks = processes.joined()
    count = rows.mixture.row_count
    own = list(for_rows(rows, range(rank, count, ranks), identities, title="looking for shared pictures"))
    parts = processes.gather(own)
    return [parts[index % ranks][index // ranks] for index in range(count)]


def identities(rows: TrainingRows, index: int) -> tuple[int, ...]:
    """The hashes of a row's media, or of its text where it has none; nothing for a row that can't be read."""
    try:
        row = rows.parse(index)
        folder = rows.image_options(index).folder
        media = {
            _hash(fingerprint(value, folder)) for source in row.sources for value in _single(source.value)
        }
    except RowError:
        return ()
    return tuple(sorted(media)) or (_hash(repr([(turn.role, turn.parts) for turn in row.turns]).encode()),)


def _single(value: Any) -> Iterator[Any]:
    """The frames of a video that is given as a list; anything else as it is."""
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _single(each)
    else:
        yield value


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=_SIZE).digest())


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
    """Pack a shuffled order with ``best_fit``, ``window`` samples at a time."""
    starts = range(0, len(order), window)
    return [
        row for start in starts for row in best_fit(order[start : start + window], lengths, capacity=capacity)
    ]

"""``--eval_split``: which rows are held out of training, so that no picture stands on both sides.

Rows that share an image, a video or an audio, directly or through other rows, are a group, and a group stays on one
side. The side follows from a hash of the seed and of the group's media alone. So every process comes to the same rows
without a word, a resumed run too, and with a fraction a row keeps its side when rows are added or put in another
order; a permutation would deal all of them anew. Only a new row that ties two groups together can move one.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from minicpm_tune import processes
from minicpm_tune.data.media.sources import fingerprint
from minicpm_tune.data.row_check import for_rows
from minicpm_tune.data.samples import TrainingRows
from minicpm_tune.errors import DataError, RowError

logger = logging.getLogger(__name__)

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
    sizes: dict[int, int] = {}
    for group in group_of:
        sizes[group] = sizes.get(group, 0) + 1
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

"""Several data files as one epoch: rows numbered through all files, each file with its share.

A file that gives more samples than it has rows gives every row as often as the count holds whole passes, and a
random remainder without replacement. Another remainder is drawn each epoch. (The official script draws with
replacement.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from minicpm_tune.batch import Origin
from minicpm_tune.data.files.row_files import Rows, open_rows
from minicpm_tune.errors import DataError
from minicpm_tune.settings.data_path import read_data_path


@dataclass(frozen=True)
class DataFile:
    """A data file, and how many samples of it an epoch holds."""

    rows: Rows
    samples: int


class Mixture:
    """The rows of all files that ``--data_path`` names.

    Args:
        data_path: What ``--data_path`` takes, see ``settings/data_path.py``.
        given_num: Whether the amounts in it count; else every row stands once.

    Raises:
        DataError: When a file can't be read, or its share is no row.
    """

    def __init__(self, data_path: str, *, given_num: bool = True) -> None:
        self.files: list[DataFile] = []
        for source in read_data_path(data_path):
            rows = open_rows(source.path)
            samples = source.samples(len(rows)) if given_num else len(rows)
            if not samples:
                raise DataError(
                    f"--data_path {source.path}: its share of {len(rows)} rows is none, expected at least one. Raise "
                    "its weight, or remove it."
                )
            self.files.append(DataFile(rows, samples))
        self._ends = list(accumulate(len(file.rows) for file in self.files))

    @property
    def samples(self) -> int:
        """Samples in an epoch."""
        return sum(file.samples for file in self.files)

    @property
    def row_count(self) -> int:
        """Rows in all files; an epoch may hold more or fewer samples."""
        return self._ends[-1]

    @property
    def names(self) -> list[str]:
        """The files, by the source number in a sample's origin."""
        return [str(file.rows.path) for file in self.files]

    def origin(self, index: int) -> Origin:
        """The file, and the row in it, that a row number means."""
        source = bisect_right(self._ends, index)
        return source, index - self.first_row(source)

    def first_row(self, source: int) -> int:
        """The number that a file's first row has through all files."""
        return self._ends[source - 1] if source else 0

    def read(self, index: int) -> Any:
        """One row as it stands in its file; ``RowError`` when it is not valid JSON."""
        source, row = self.origin(index)
        return self.files[source].rows[row]

    def epoch_order(self, *, seed: int, epoch: int, shuffle: bool = True) -> list[int]:
        """The rows of one epoch, the same on every rank."""
        sizes = [len(file.rows) for file in self.files]
        counts = [file.samples for file in self.files]
        return epoch_order(sizes, counts, seed=seed, epoch=epoch, shuffle=shuffle).tolist()


def epoch_order(
    sizes: Sequence[int], counts: Sequence[int], *, seed: int, epoch: int, shuffle: bool
) -> np.ndarray:
    """The rows of one epoch.

    Args:
        sizes: Rows of each source; rows are numbered through all sources.
        counts: Samples of each source per epoch.
        seed: Decides the draws, together with ``epoch``.
        epoch: The epoch, counted from 0.
        shuffle: Whether the rows are mixed; otherwise they stand in their order.

    Returns:
        Row numbers, int64 ``[sum(counts)]``; the same wherever it is computed.

    Example:
        >>> epoch_order([3, 2], [3, 4], seed=0, epoch=0, shuffle=False).tolist()
        [0, 1, 2, 3, 3, 4, 4]
    """
    drawn = []
    first = 0
    for number, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        passes, rest = divmod(count, size)
        rows = np.tile(np.arange(size, dtype=np.int64), passes)
        remainder = np.random.default_rng([seed, epoch, number]).permutation(size)[:rest]
        drawn.append(first + np.sort(np.concatenate([rows, remainder]), kind="stable"))
        first += size
    order = np.concatenate(drawn)
    if shuffle:
        np.random.default_rng([seed, epoch, len(sizes)]).shuffle(order)
    return order

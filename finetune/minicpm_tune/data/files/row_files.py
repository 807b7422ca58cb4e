"""The files that ``--data_path`` names: each opened by its path, and all as one epoch, each with its share.

A path is a JSON, JSONL, CSV or Parquet file, a folder, or a pattern. Rows are numbered through all files. A file that
gives more samples than it has rows gives every row as often as the count holds whole passes, and a random remainder
without replacement. Another remainder is drawn each epoch. (The official script draws with replacement.)
"""

from __future__ import annotations

import glob
from bisect import bisect_right
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from minicpm_tune.batch import Origin
from minicpm_tune.data.files.json_rows import JsonRows, Rows
from minicpm_tune.data.files.row_forms import name_columns, read_columns
from minicpm_tune.errors import DataError
from minicpm_tune.settings.data_arguments import MixtureSource, read_data_path

TABLES = (".csv", ".tsv")
_UTF_8 = "Save the file as UTF-8 (in an editor, or with: iconv -f UTF-16 -t UTF-8)"
# How files start that are given in the place of JSON, what they are, and what to do.
_OTHER_FILES = (
    (b"\xff\xfe", "UTF-16 text", _UTF_8),
    (b"\xfe\xff", "UTF-16 text", _UTF_8),
    *((start.encode(code), "UTF-16 text", _UTF_8) for start in "[{" for code in ("utf-16-le", "utf-16-be")),
    (b"\x1f\x8b", "a file compressed with gzip", "Unpack it: gunzip --keep"),
    (b"BZh", "a file compressed with bzip2", "Unpack it: bunzip2 --keep"),
    (b"\xfd7zXZ", "a file compressed with xz", "Unpack it: unxz --keep"),
    (b"\x28\xb5\x2f\xfd", "a file compressed with zstd", "Unpack it: unzstd --keep"),
    (b"PK\x03\x04", "a zip archive (or a spreadsheet)", "Unpack it, or export it as JSON"),
    (b"PAR1", "a Parquet file", "Give it a name that ends in .parquet"),
    (b"ARROW1", "an Arrow file", "Give the folder that datasets.save_to_disk wrote, or save it as Parquet"),
)


class JoinedRows:
    """Several files as one, or the first rows of them.

    Args:
        path: What messages call them; its folder is what relative paths are relative to.
        parts: The files.
        most: How many of their rows are used; None: all.
    """

    def __init__(self, path: Path, parts: Sequence[Rows], *, most: int | None = None) -> None:
        self.path = path
        self.files: Sequence[Path] = [file for part in parts for file in part.files]
        tables = [part.columns for part in parts if part.columns is not None]
        self.columns: Sequence[str] | None = None
        if len(tables) == len(parts):
            self.columns = list(dict.fromkeys(name for table in tables for name in table))
        self.text_cells = all(part.text_cells for part in parts)
        self._parts = parts
        self._starts = [0, *accumulate(len(part) for part in parts)]
        self._count = self._starts[-1] if most is None else most

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        part = bisect_right(self._starts, index) - 1
        return self._parts[part][index - self._starts[part]]


def open_rows(path: str | Path) -> Rows:
    """Open a data file, a folder, or files by a pattern with ``*``.

    Args:
        path: A JSON list, JSONL, Parquet, CSV or TSV file, a folder of Parquet files, a data set saved by Hugging Face
            datasets, or a pattern.

    Raises:
        DataError: When there is nothing, or nothing in an accepted format.
    """
    path = Path(path).expanduser()
    if not path.exists() and "*" in path.name:
        found = sorted(glob.glob(str(path)))
        if found:
            return JoinedRows(path, [open_rows(name) for name in found])
    if not path.exists():
        raise DataError(
            f"--data_path {path}: no such file, expected rows. Fix the path (looked at {path.absolute()})."
        )
    rows: Rows
    if path.is_dir() or path.suffix == ".parquet":
        rows = _arrow_rows(path)
    elif path.stat().st_size == 0:
        raise DataError(
            f"--data_path {path}: the file is empty, expected rows. Write rows into it, or fix the path."
        )
    else:
        _check_is_text(path)
        rows = _arrow_rows(path) if path.suffix in TABLES else JsonRows(path)
    if not len(rows):
        raise DataError(
            f"--data_path {path}: the file has no rows, expected some. Write rows into it, or fix the path."
        )
    return rows


def _check_is_text(path: Path) -> None:
    """Refuse what is no JSON text by its first bytes, with what to do instead."""
    with open(path, "rb") as file:
        start = file.read(512)
    for magic, kind, remedy in _OTHER_FILES:
        if start.startswith(magic):
            raise DataError(
                f"--data_path {path}: found {kind}, expected JSON, JSONL, CSV or Parquet. {remedy}."
            )


def _arrow_rows(path: Path) -> Rows:
    # Imported here: datasets takes two seconds, which JSON files need not wait for.
    from minicpm_tune.data.files.arrow_rows import open_csv, open_parquet, open_parquet_folder, open_saved

    if not path.is_dir():
        return open_csv(path) if path.suffix in TABLES else open_parquet(path)
    saved = open_saved(path)
    return JoinedRows(path / "rows", open_parquet_folder(path)) if saved is None else saved


@dataclass(frozen=True)
class DataFile:
    """A data file, and how many samples of it an epoch holds.

    Attributes:
        rows: The rows of the file.
        samples: Samples per epoch.
        source: How ``--data_path`` names it.
        used: How many of its rows are used.
    """

    rows: Rows
    samples: int
    source: MixtureSource
    used: int


class Mixture:
    """The rows of all files that ``--data_path`` names.

    Attributes:
        files: The files.
        ends: The numbers behind each file's last row.
        numbers: The numbers of the rows that are used, int64, in their order.
        is_part: Whether only some of the files' rows are used.

    Args:
        data_path: What ``--data_path`` takes, see ``settings/data_arguments.py``.
        given_num: Whether the amounts in it count; else every row stands once.
        max_samples: The rows that are taken of each file at most, the first ones; None: all.
        columns: What ``--columns`` takes, see ``files/row_forms.py``.

    Raises:
        DataError: When a file can't be read, or its share is no row.
    """

    def __init__(
        self,
        data_path: str,
        *,
        given_num: bool = True,
        max_samples: int | None = None,
        columns: str | None = None,
    ) -> None:
        self.files: list[DataFile] = []
        self._given_num = given_num
        sources = read_data_path(data_path)
        opened = name_columns([open_rows(source.path) for source in sources], read_columns(columns))
        for source, rows in zip(sources, opened, strict=True):
            if max_samples is not None and max_samples < len(rows):
                rows = JoinedRows(rows.path, [rows], most=max_samples)
            if max_samples is not None and source.count is not None:
                source = replace(source, count=min(source.count, max_samples))
            self.files.append(self._file(rows, source, len(rows)))
        self.ends = list(accumulate(len(file.rows) for file in self.files))
        self.numbers, self.is_part = np.arange(self.row_count), False

    def _file(self, rows: Rows, source: MixtureSource, used: int) -> DataFile:
        """A file of which so many rows are used."""
        samples = source.samples(used) if self._given_num else used
        if not samples:
            raise DataError(
                f"--data_path {source.path}: its share of {used} rows is none, expected at least one. Raise its "
                "weight, or remove it."
            )
        return DataFile(rows, samples, source, used)

    def part(self, chosen: np.ndarray, *, once: bool = False) -> Mixture:
        """The same files with some of their rows, which keep their numbers.

        Args:
            chosen: Whether a row is used, bool ``[row_count]``.
            once: Whether every row stands once, whatever ``--data_path`` says.

        Raises:
            DataError: When a file's share is no row.
        """
        part = copy(self)
        part.files, part.numbers, part.is_part = [], np.flatnonzero(chosen), True
        for number, file in enumerate(self.files):
            used = int(chosen[self.first_row(number) : self.ends[number]].sum())
            if not used and not once:
                raise DataError(
                    f"--data_path {file.source.path}: all of its {len(file.rows)} rows are held out, expected at least "
                    "one to train on. Choose another --eval_split or seed, or give --eval_data_path."
                )
            once_each = replace(file, samples=used, used=used)
            part.files.append(once_each if once else self._file(file.rows, file.source, used))
        return part

    @property
    def samples(self) -> int:
        """Samples in an epoch."""
        return sum(file.samples for file in self.files)

    @property
    def row_count(self) -> int:
        """Rows in all files; an epoch may hold more or fewer samples."""
        return self.ends[-1]

    @property
    def names(self) -> list[str]:
        """The files, by the source number in a sample's origin."""
        return [str(file.rows.path) for file in self.files]

    def origin(self, index: int) -> Origin:
        """The file, and the row in it, that a row number means."""
        source = bisect_right(self.ends, index)
        return source, index - self.first_row(source)

    def first_row(self, source: int) -> int:
        """The number that a file's first row has through all files."""
        return self.ends[source - 1] if source else 0

    def read(self, index: int) -> Any:
        """One row as it stands in its file; ``RowError`` when it is not valid JSON."""
        source, row = self.origin(index)
        return self.files[source].rows[row]

    def epoch_order(self, epoch: int, *, seed: int, shuffle: bool = True) -> list[int]:
        """The rows of one epoch, the same on every rank."""
        sizes = [file.used for file in self.files]
        counts = [file.samples for file in self.files]
        return self.numbers[epoch_order(sizes, counts, seed=seed, epoch=epoch, shuffle=shuffle)].tolist()


def epoch_order(
    sizes: Sequence[int], counts: Sequence[int], *, seed: int, epoch: int, shuffle: bool
) -> np.ndarray:
    """The rows of one epoch.

    Args:
        sizes: Rows of each source, which may have none without samples; rows are numbered through all sources.
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
        passes, rest = divmod(count, size) if size else (0, 0)
        rows = np.tile(np.arange(size, dtype=np.int64), passes)
        remainder = np.random.default_rng([seed, epoch, number]).permutation(size)[:rest]
        drawn.append(first + np.sort(np.concatenate([rows, remainder]), kind="stable"))
        first += size
    order = np.concatenate(drawn)
    if shuffle:
        np.random.default_rng([seed, epoch, len(sizes)]).shuffle(order)
    return order

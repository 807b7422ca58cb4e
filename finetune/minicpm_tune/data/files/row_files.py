"""A path -> rows: JSON, JSONL, CSV, Parquet, a folder, or several files by a pattern."""

from __future__ import annotations

import glob
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from minicpm_tune.data.files.json_rows import JsonRows
from minicpm_tune.errors import DataError

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


class Rows(Protocol):
    """The rows of a data file.

    Attributes:
        path: What messages call it.
        files: The files whose states decide its rows.
        columns: The columns of a table; None where every row has keys of its own.
        text_cells: Whether every value in it is a text, as in a CSV file.
    """

    path: Path
    files: Sequence[Path]
    columns: Sequence[str] | None
    text_cells: bool

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, index: int) -> Any:
        """Read one row; ``RowError`` when it is not valid."""
        ...


class JoinedRows:
    """Several files as one.

    Args:
        path: What messages call them; its folder is what relative paths are relative to.
        parts: The files.
    """

    def __init__(self, path: Path, parts: Sequence[Rows]) -> None:
        self.path = path
        self.files: Sequence[Path] = [file for part in parts for file in part.files]
        tables = [part.columns for part in parts if part.columns is not None]
        self.columns: Sequence[str] | None = None
        if len(tables) == len(parts):
            self.columns = list(dict.fromkeys(name for table in tables for name in table))
        self.text_cells = all(part.text_cells for part in parts)
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Any:
        part = bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]


class FirstRows:
    """The first rows of a file.

    Args:
        rows: The file.
        count: How many of its rows.
    """

    def __init__(self, rows: Rows, count: int) -> None:
        self.path, self.files = rows.path, rows.files
        self.columns, self.text_cells = rows.columns, rows.text_cells
        self._rows, self._count = rows, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        return self._rows[index]


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

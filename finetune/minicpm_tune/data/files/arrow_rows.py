"""Rows of Parquet and CSV files, and of data sets saved by Hugging Face datasets, read through that library.

It memory-maps Arrow files, which gives single rows without decoding their neighbors. A data set on disk is such a
file already; a Parquet or CSV file is converted once into the cache folder.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from minicpm_tune.errors import DataError, RowError
from minicpm_tune.files import cache_folder

_SPLIT_NAME = re.compile(r"(train|test|validation|valid|val|dev)\b|(train|test|validation|valid|val|dev)[-_]")
_READ_ERRORS = (
    datasets.exceptions.DatasetGenerationError,
    pyarrow.ArrowException,
    OSError,
    ValueError,
    TypeError,
    LookupError,
)


class ArrowRows:
    """The rows of one memory-mapped data set.

    Args:
        path: What messages call it; its folder is what relative paths start from.
        files: The files whose states decide its rows.
        rows: The data set. Images and sounds in it stay as stored, {bytes, path}.
        text_cells: Whether it comes from a file in which everything is text.
    """

    def __init__(
        self, path: Path, files: Sequence[Path], rows: datasets.Dataset, *, text_cells: bool = False
    ) -> None:
        self.path, self.files, self.text_cells = path, files, text_cells
        self.columns: Sequence[str] | None = rows.column_names
        self._rows = rows.with_format("arrow")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self._rows[index].to_pylist()[0]
        except ValueError as error:  # a text column that holds no text
            raise RowError("table", f"the row can't be read ({error}). Write the table again.") from error


def open_parquet(path: Path) -> ArrowRows:
    """Open a Parquet file.

    Raises:
        DataError: When it is not a Parquet file.
    """
    with _converting(path, "Parquet"):
        rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(cache_folder()))
    return ArrowRows(path, [path], rows)


def open_csv(path: Path) -> ArrowRows:
    """Open a CSV file (``.csv``, with commas) or a TSV file (``.tsv``, with tabs); its first line names the columns.

    Raises:
        DataError: When it can't be read.
    """
    separator = "\t" if path.suffix == ".tsv" else ","
    # As text: "007" stays as it is, and an answer "NA" or "None" is no missing value.
    texts = datasets.Features(dict.fromkeys(_header(path, separator), datasets.Value("string")))
    with _converting(path, "CSV"):
        rows = datasets.Dataset.from_csv(
            str(path), cache_dir=str(cache_folder()), features=texts, sep=separator, keep_default_na=False
        )
    return ArrowRows(path, [path], rows, text_cells=True)


def _header(path: Path, separator: str) -> list[str]:
    """The names in a CSV file's first line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter=separator)
            names, first = next(lines, []), next(lines, [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"--data_path {path}: not readable as CSV ({error}). Save it as UTF-8, with commas (.csv) or tabs (.tsv)."
        ) from error
    # pandas would take the first cells of longer lines as names of the rows, and shift the others.
    if len(first) > len(names) or len(set(names)) < len(names) or not all(names):
        raise DataError(
            f"--data_path {path}: the first line has the names {names}, and the second has {len(first)} cells, "
            "expected a name for each column, all different. Fix the first line."
        )
    return names


@contextmanager
def _converting(path: Path, kind: str) -> Iterator[None]:
    """Keep the library's progress bars off the screen, and make its errors a message."""
    silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    except _READ_ERRORS as error:
        raise DataError(
            f"--data_path {path}: not readable as {kind} ({error.__cause__ or error}). Write the file again."
        ) from error
    finally:
        if not silent:
            datasets.enable_progress_bars()


def open_saved(path: Path) -> ArrowRows | None:
    """Open a folder that Hugging Face datasets saved; None when it is none.

    Raises:
        DataError: When it can't be read, or holds several splits.
    """
    splits = path / "dataset_dict.json"
    if splits.is_file():
        names = json.loads(splits.read_text(encoding="utf-8"))["splits"]
        _check_one_split(path, names)
        path = path / names[0]
    if not (path / "state.json").is_file():
        return None
    try:
        rows = datasets.Dataset.load_from_disk(str(path))
    except _READ_ERRORS as error:
        raise DataError(
            f"--data_path {path}: not readable as Arrow ({error}). Save the data set again."
        ) from error
    return ArrowRows(path / "state.json", [Path(entry["filename"]) for entry in rows.cache_files], rows)


def open_parquet_folder(path: Path) -> list[ArrowRows]:
    """Open all Parquet files in a folder.

    Raises:
        DataError: When it holds none, or those of several splits.
    """
    found = sorted(path.rglob("*.parquet"))
    if not found:
        raise DataError(
            f"--data_path {path}: the folder holds no Parquet files and no data set saved by datasets.save_to_disk, "
            "expected one of the two. Give the path of the data file itself."
        )
    matches = {(_SPLIT_NAME.match(file.name) or _SPLIT_NAME.match(file.parent.name)) for file in found}
    _check_one_split(path, sorted({match.group().rstrip("-_") for match in matches if match}))
    return [open_parquet(file) for file in found]


def _check_one_split(path: Path, names: Sequence[str]) -> None:
    if len(names) > 1:
        raise DataError(
            f"--data_path {path}: the folder holds the splits {', '.join(names)}, expected one, so that no test rows "
            f"are trained on by accident. Give {path / names[0]}, or a pattern such as "
            f"{path / (names[0] + '-*.parquet')}."
        )

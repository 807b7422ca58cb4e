"""Random access to the rows of a data file, without keeping them in memory.

A JSONL file is indexed once: where each row starts and ends, kept in the cache folder and found again by
path, size and time of change. A JSON list is written out once as JSONL into the same cache. An indexed file
of a million rows opens in milliseconds, and a worker holds no Python object per row.
"""

from __future__ import annotations

import glob
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from minicpm_tune.data.files.index_cache import cached, replacing
from minicpm_tune.data.files.json_errors import explain
from minicpm_tune.errors import DataError, RowError

_NOT_SPACE = re.compile(r"\S")


class Rows(Protocol):
    """The rows of a data file.

    Attributes:
        path: What messages call it.
        files: The files whose states decide its rows.
    """

    path: Path
    files: Sequence[Path]

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, index: int) -> Any:
        """Read one row; ``RowError`` when it is not valid."""
        ...


class JsonRows:
    """The rows of a JSONL file, or of a JSON list through its cached JSONL.

    Args:
        path: The file.

    Raises:
        DataError: When a JSON list is not valid JSON; the rows of a JSONL file are parsed when they are read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: Sequence[Path] = [path]
        self._lines_path, spans_path = _index(path)
        self._spans = np.load(spans_path, mmap_mode="r")
        self._file: IO[bytes] | None = None
        self._owner = 0

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Any:
        start, end = map(int, self._spans[index])
        if (
            self._file is None or self._owner != os.getpid()
        ):  # a forked worker must not share the file position
            self._file = open(self._lines_path, "rb")  # open for the worker's life
            self._owner = os.getpid()
        self._file.seek(start)
        line = self._file.read(end - start)
        try:
            return json.loads(line)
        except json.JSONDecodeError as error:
            raise RowError("JSON", explain(line.decode("utf-8", "replace"), error)) from error
        except UnicodeDecodeError as error:
            raise RowError("JSON", f"the row is not UTF-8 text ({error}). Save the file as UTF-8.") from error
        except RecursionError as error:
            raise RowError(
                "JSON", "the row is nested too deeply, expected a conversation. Remove it."
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_spans": np.asarray(self._spans)}


class JoinedRows:
    """Several files as one.

    Args:
        path: What to call them in messages; its folder is what relative paths are relative to.
        parts: The files.
    """

    def __init__(self, path: Path, parts: Sequence[Rows]) -> None:
        self.path = path
        self.files: Sequence[Path] = [file for part in parts for file in part.files]
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Any:
        part = bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]


def open_rows(path: str | Path) -> Rows:
    """Open a data file, a folder, or files by a pattern with ``*``.

    Args:
        path: A JSON list, JSONL or Parquet file, a folder of Parquet files, a data set saved by Hugging Face
            datasets, or a pattern.

    Returns:
        The rows.

    Raises:
        DataError: When there is nothing, or nothing in an accepted format.
    """
    path = Path(path).expanduser()
    if not path.exists() and "*" in path.name:
        found = sorted(glob.glob(str(path)))
        if found:
            return JoinedRows(path, [open_rows(name) for name in found])
    if path.is_dir() or path.suffix == ".parquet":
        from minicpm_tune.data.files.arrow_rows import (  # needs pyarrow, which JSON files don't
            open_folder,
            open_parquet,
        )

        return open_folder(path) if path.is_dir() else open_parquet(path)
    if not path.is_file():
        raise DataError(
            f"--data_path {path}: no such file, expected rows. Fix the path (looked at {path.absolute()})."
        )
    if path.stat().st_size == 0:
        raise DataError(
            f"--data_path {path}: the file is empty, expected rows. Write rows into it, or fix the path."
        )
    rows = JsonRows(path)
    if not len(rows):
        raise DataError(
            f"--data_path {path}: the file has no rows, expected some. Write rows into it, or fix the path."
        )
    return rows


def _index(path: Path) -> tuple[Path, Path]:
    """Find or make the spans of a file's rows; for a JSON list also its JSONL copy."""
    spans_path, copy_path = cached(path, ".npy"), cached(path, ".jsonl")
    is_list = _first_character(path) == b"["
    lines_path = copy_path if is_list else path
    if spans_path.is_file() and lines_path.is_file():
        return lines_path, spans_path
    if is_list:
        with replacing(copy_path) as copy:
            spans = _write_lines(_list_items(path), copy)
    else:
        spans = _line_spans(path)
    with replacing(spans_path) as file:
        np.save(file, np.asarray(spans, dtype=np.int64).reshape(-1, 2))
    return lines_path, spans_path


def _first_character(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(65536).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _line_spans(path: Path) -> list[tuple[int, int]]:
    """Where the rows of a JSONL file start and end, in bytes; blank lines are no rows."""
    spans = []
    position = 0
    with open(path, "rb") as file:
        for line in file:
            start = position
            position += len(line)
            if start == 0 and line.startswith(b"\xef\xbb\xbf"):
                start = 3
            if not line.isspace():
                spans.append((start, position))
    if len(spans) > 1:
        _check_is_jsonl(path, spans[0])
    return spans


def _check_is_jsonl(path: Path, span: tuple[int, int]) -> None:
    """Refuse an object over several lines, which would give an error for every line of it."""
    with open(path, "rb") as file:
        first = file.read(span[1])[span[0] :].strip()
    if first in (b"{", b"") or (first.startswith(b"{") and not first.endswith(b"}")):
        raise DataError(
            f"--data_path {path}: the first row {first[:60]!r} does not end on its line, expected a JSON "
            "list "
            "([ ... ]) or JSONL (one whole row per line). Put the rows in a list."
        )


def _list_items(path: Path) -> Iterator[Any]:
    """The items of a JSON list, one at a time: the whole list as objects would take ten times the text."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        yield from _parsed_items(text)
    except UnicodeDecodeError as error:
        raise DataError(f"--data_path {path}: not UTF-8 text ({error}). Save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"--data_path {path}: not valid JSON, {explain(text, error)}") from error
    except RecursionError as error:
        raise DataError(
            f"--data_path {path}: nested too deeply, expected a list of rows. Fix the file."
        ) from error


def _parsed_items(text: str) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    position = _after_space(text, text.index("[") + 1)
    while text[position : position + 1] != "]":
        item, position = decoder.raw_decode(text, position)
        yield item
        position = _after_space(text, position)
        separator = text[position : position + 1]
        if separator == ",":
            position = _after_space(text, position + 1)
        if separator not in (",", "]") or (separator == "," and text[position : position + 1] == "]"):
            json.loads(text)  # raises, and names the place
    if text[position + 1 :].strip():
        json.loads(text)


def _after_space(text: str, position: int) -> int:
    found = _NOT_SPACE.search(text, position)
    return found.start() if found else len(text)


def _write_lines(items: Iterator[Any], file: IO[bytes]) -> list[tuple[int, int]]:
    spans = []
    position = 0
    for item in items:
        start = position
        position += file.write(json.dumps(item, ensure_ascii=True).encode() + b"\n")
        spans.append((start, position))
    return spans

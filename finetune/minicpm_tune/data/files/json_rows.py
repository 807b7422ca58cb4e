"""Random access to the rows of a JSON file, without keeping them in memory; and what all data files have in common.

A JSONL file is indexed once: where each row starts and ends, kept in the cache folder and found again by path, size
and time of change. A JSON list is written out once, item by item, into the same cache. An indexed file of a million
rows opens in milliseconds, and a worker holds no Python object per row.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from minicpm_tune.errors import DataError, RowError, check_unicode
from minicpm_tune.files import cache_file, file_state, written_whole

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NOT_SPACE = re.compile(r"\S")
_LONGEST_FIXED = 10**6  # characters; nobody reads a longer line, and parsing it takes seconds
_SHOWN = 200
_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")  # as \ud83d, the first half of an emoji
_TO_JSON = "python -c \"import ast, json; json.dump(ast.literal_eval(open({source!r}).read()), open({target!r}, 'w'))\""


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


class JsonRows:
    """The rows of a JSONL file, or of a JSON list through its copy in the cache.

    Args:
        path: The file.

    Raises:
        DataError: When a JSON list is not valid JSON; the rows of a JSONL file are parsed when they are read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: Sequence[Path] = [path]
        self.columns: Sequence[str] | None = None
        self.text_cells = False
        self._lines_path, spans_path = _index(path)
        self._spans = np.load(spans_path, mmap_mode="r")
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Any:
        start, end = map(int, self._spans[index])
        if self._file is None:
            self._file = open(self._lines_path, "rb")  # open for the worker's life
        # pread: a forked worker shares the file with its parent, and a seek would move both.
        return parse_json_row(os.pread(self._file.fileno(), end - start, start))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_spans": np.asarray(self._spans)}


def parse_json_row(line: bytes) -> Any:
    """Parse one row.

    Raises:
        RowError: When it is not valid JSON.
    """
    try:
        row = json.loads(line, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        text = line.decode("utf-8", "replace")
        fixed = _python_as_json(text)
        raise RowError(
            "JSON", explain(text, error) + (f"\n  fixed: {_cut(fixed)}" if fixed else "")
        ) from error
    except UnicodeDecodeError as error:
        raise RowError("JSON", f"the row is not UTF-8 text ({error}). Save the file as UTF-8.") from error
    except RecursionError as error:
        raise RowError("JSON", "the row is nested too deeply, expected a conversation. Remove it.") from error
    except RowError:
        raise
    except ValueError as error:  # int() takes no more than 4300 digits
        raise RowError(
            "JSON",
            "a number in the row has more than 4300 digits, expected fewer. Write it as a text, or remove it.",
        ) from error
    if _HALF_CHARACTER.search(line):
        check_unicode(json.dumps(row, ensure_ascii=False), "the row")
    return row


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError(
            "JSON",
            f"the key {twice!r:.80} stands twice in one object, expected it once. Rename or remove one.",
        )
    return found


def _index(path: Path) -> tuple[Path, Path]:
    """Find or make the spans of a file's rows; for a JSON list also its copy."""
    state = file_state(path)
    spans_path, copy_path = cache_file(state, ".npy"), cache_file(state, ".items")
    with open(path, "rb") as file:
        is_list = file.read(65536).removeprefix(_BYTE_ORDER_MARK).lstrip()[:1] == b"["
    lines_path = copy_path if is_list else path
    if spans_path.is_file() and lines_path.is_file():
        return lines_path, spans_path
    if is_list:
        with written_whole(copy_path) as copy:
            spans = _write_items(path, copy)
    else:
        spans = _line_spans(path)
    with written_whole(spans_path) as index:
        np.save(index, np.asarray(spans, dtype=np.int64).reshape(-1, 2))
    return lines_path, spans_path


def _line_spans(path: Path) -> list[tuple[int, int]]:
    """Where the rows of a JSONL file start and end, in bytes; blank lines are no rows.

    An object over several lines is refused at once: it would give an error for every line of it.
    """
    spans, position, first = [], 0, b""
    with open(path, "rb") as file:
        for line in file:
            start = position
            position += len(line)
            if start == 0 and line.startswith(_BYTE_ORDER_MARK):
                start = len(_BYTE_ORDER_MARK)
            if not line.isspace():
                spans.append((start, position))
                first = first or line
    row = first.removeprefix(_BYTE_ORDER_MARK).decode("utf-8", "replace").strip()
    if len(spans) > 1 and (row in ("{", "") or (row.startswith("{") and not row.rstrip(",").endswith("}"))):
        raise DataError(
            f"--data_path {path}: the first row {row[:60]!r} does not end on its line, expected a JSON list "
            "([ ... ]) or JSONL (one whole row per line). Put the rows in a list."
        )
    return spans


def _write_items(path: Path, copy: IO[bytes]) -> list[tuple[int, int]]:
    """Write the items of a JSON list one after the other, each as it stands, and give their spans in bytes."""
    spans = []
    position = 0
    try:
        text = path.read_text(encoding="utf-8-sig")
        for start, end in _item_spans(text):
            item = text[start:end].encode() + b"\n"
            spans.append((position, position + len(item)))
            position += copy.write(item)
    except UnicodeDecodeError as error:
        raise DataError(f"--data_path {path}: not UTF-8 text ({error}). Save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        message = f"--data_path {path}: not valid JSON, {explain(text, error)}"
        if _python_as_json(text):
            command = _TO_JSON.format(source=str(path), target=f"{path.stem}_fixed.json")
            message += f"\nThe file is a Python literal. To write it as JSON:\n  {command}"
        raise DataError(message) from error
    except RecursionError as error:
        raise DataError(
            f"--data_path {path}: nested too deeply, expected a list of rows. Fix the file."
        ) from error
    return spans


def _item_spans(text: str) -> Iterator[tuple[int, int]]:
    """Where the items of a JSON list stand, one at a time: all as objects would take ten times the text."""
    decoder = json.JSONDecoder(parse_int=str)  # int() refuses long numbers, which are that row's problem
    position = _after_space(text, text.index("[") + 1)
    while text[position : position + 1] != "]":
        start = position
        _, position = decoder.raw_decode(text, start)
        yield start, position
        position = _after_space(text, position)
        separator = text[position : position + 1]
        if separator == ",":
            position = _after_space(text, position + 1)
        if separator not in (",", "]") or (separator == "," and text[position : position + 1] == "]"):
            decoder.decode(text)  # raises, and names the place
    if text[position + 1 :].strip():
        decoder.decode(text)


def _after_space(text: str, position: int) -> int:
    found = _NOT_SPACE.search(text, position)
    return found.start() if found else len(text)


# --- what is wrong with a JSON text ---


def explain(text: str, error: json.JSONDecodeError) -> str:
    """Describe a JSON error: the place, what stands there and what should, and the line.

    Example:
        >>> try:
        ...     json.loads("{'role': 'user'}")
        ... except json.JSONDecodeError as error:
        ...     print(explain("{'role': 'user'}", error))
        line 1, column 2: found a single quote, expected a double quote.
          found: {'role': 'user'}
    """
    position, found, expected = _diagnosis(text, error)
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    line = text[start : len(text) if end < 0 else end]
    column = position - start
    if len(line) > _SHOWN:
        line = line[max(0, column - _SHOWN // 2) : column + _SHOWN // 2]
    return (
        f"line {text.count(chr(10), 0, position) + 1}, column {column + 1}: found {found}, expected {expected}.\n"
        f"  found: {line.strip()}"
    )


def _diagnosis(text: str, error: json.JSONDecodeError) -> tuple[int, str, str]:
    """The position to point at, what stands there, and what should."""
    position = min(error.pos, len(text))
    before = text[:position].rstrip()
    here = text[position : position + 1]
    if before.endswith(",") and here in "]}":
        return len(before) - 1, f"a comma before {here!r}", "none after the last item"
    if here == "," and text[position + 1 :].lstrip()[:1] in ("]", "}", ""):
        place = "a comma before a closing bracket" if text[position + 1 :].strip() else "a comma at the end"
        return position, place, "none after the last item"
    if here == "'":
        return position, "a single quote", "a double quote"
    if not here:
        return max(len(before) - 1, 0), "the end of the text", "the rest of the value (is the file cut off?)"
    if "delimiter" in error.msg:
        return position, repr(here), "a comma between two items"
    if "control character" in error.msg:
        return position, "a line break or control character inside a text", "it to be written as \\n"
    word = re.match(r"\w+", text[position : position + 20])
    return position, repr(word.group() if word else here), _expected(error.msg)


def _expected(message: str) -> str:
    if message.startswith("Expecting "):
        return message.removeprefix("Expecting ").split(":")[0]
    return "nothing more after the value" if message.startswith("Extra") else f"valid JSON ({message})"


def _python_as_json(text: str) -> str | None:
    """A Python literal as JSON, None for what is no literal.

    The example in the official guides has single quotes and commas before closing brackets, and users copy it.
    """
    if len(text) > _LONGEST_FIXED:
        return None
    try:
        return json.dumps(ast.literal_eval(text.strip().removesuffix(",")), ensure_ascii=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _cut(line: str) -> str:
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]} ..."

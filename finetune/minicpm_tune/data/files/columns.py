"""``--columns``: which column of a table, or key of a row, is the question, the answer, the picture.

The flag renames the columns of every file that has them; what the new names mean, ``files/row_forms.py`` and
``data/row_parsing.py`` know. In a CSV file every cell is a text, so lists, objects and weights are read out of theirs.
"""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minicpm_tune.data.files import row_forms
from minicpm_tune.data.files.row_files import Rows
from minicpm_tune.data.row_keys import ROW_KEYS, name_list
from minicpm_tune.errors import DataError, RowError

logger = logging.getLogger(__name__)

TARGETS = tuple(sorted(ROW_KEYS | row_forms.KEYS | {"audio", "audios"}))
_LOOKED_AT = 100  # rows of a JSON file, for the names of its keys
_CONVERSATIONS = {"conversations", "messages"}
# Whose texts in a CSV file may be lists or objects.
_STRUCTURED = _CONVERSATIONS | {
    "image", "images", "video", "videos", "audio", "audios", "objects", "history", "answers",
}  # fmt: skip


class NamedRows:
    """The rows of a file with their columns renamed, and the cells of a CSV file read.

    Args:
        rows: The file.
        names: Column -> its new name.
    """

    def __init__(self, rows: Rows, names: Mapping[str, str]) -> None:
        self.path, self.files, self.text_cells = rows.path, rows.files, False
        self.columns: Sequence[str] | None = None
        if rows.columns is not None:
            self.columns = [names.get(name, name) for name in rows.columns]
        self._rows, self._names, self._reads_cells = rows, dict(names), rows.text_cells

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        row = self._rows[index]
        if not isinstance(row, Mapping):
            return row
        named: dict[str, Any] = {}
        for key, value in row.items():
            name = self._names.get(str(key), str(key))
            if name in named and named[name] is not None and value is not None:
                raise RowError(
                    "columns",
                    f"the row has two values for {name!r}, expected one. Leave a column out of --columns.",
                )
            if named.get(name) is None:
                named[name] = _read_cell(name, value) if self._reads_cells else value
        return named


def _read_cell(name: str, text: Any) -> Any:
    """What a cell of a CSV file means; an empty one is nothing, or an empty text."""
    if not text and (name == "weight" or name in _STRUCTURED):
        return None
    if name == "weight":
        try:
            return float(text)
        except ValueError as error:
            raise RowError(
                "columns", f"'weight' is {text!r:.80}, expected a number. Fix the cell."
            ) from error
    if name not in _STRUCTURED or text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        return json.loads(text)
    except ValueError:
        try:
            return ast.literal_eval(text.strip())  # as pandas writes lists
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise RowError(
                "columns",
                f"{name!r} is {text!r:.80}, which is neither JSON nor a Python literal ({error}). Fix the cell.",
            ) from error


def read_columns(text: str | None) -> dict[str, str]:
    """Parse ``--columns``.

    Returns:
        Column -> its new name; nothing without the flag.

    Raises:
        DataError: When it is not a JSON object of names, or a new name means nothing here.

    Example:
        >>> read_columns('{"image_path": "image"}')
        {'image_path': 'image'}
    """
    if text is None:
        return {}
    try:
        names = json.loads(text)
    except ValueError as error:
        raise DataError(
            f"--columns {text!r:.200}: not valid JSON ({error}), expected such as "
            '\'{"query": "user", "response": "assistant"}\'. Fix it; a shell needs single quotes around it.'
        ) from error
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise DataError(
            f"--columns {text!r:.200}: expected an object that gives columns new names, such as "
            '\'{"query": "user", "response": "assistant"}\'. Fix it.'
        )
    for column, name in names.items():
        if name not in TARGETS:
            raise DataError(
                f"--columns: {column!r} is to be {name!r}, expected one of {', '.join(TARGETS)}. Choose one."
            )
    return names


def name_columns(files: Sequence[Rows], names: Mapping[str, str]) -> list[Rows]:
    """Rename the columns of every file that has them.

    Args:
        files: The files of one data set.
        names: What ``read_columns`` gave.

    Raises:
        DataError: When no file has a column, or a file would have two of one name.
    """
    if not names:
        return [NamedRows(rows, {}) if rows.text_cells else rows for rows in files]
    columns = [_columns(rows) for rows in files]
    found = list(dict.fromkeys(name for each in columns for name in each))
    missing = [name for name in names if name not in found]
    if len(missing) == len(names) and _CONVERSATIONS & set(found):
        missing = []  # such as evaluation rows in the official form, beside training rows in a table
    if missing:
        listed = ", ".join(map(repr, missing))
        raise DataError(
            f"--columns: no column {listed} in {_paths(files)}, expected those found: {name_list(found, most=40)}. "
            "Fix the name, or leave it out."
        )
    named: list[Rows] = []
    for rows, each in zip(files, columns, strict=True):
        renames = bool(set(names) & set(each))
        named.append(NamedRows(rows, _for_file(rows, each, names)) if renames or rows.text_cells else rows)
    return named


def _for_file(rows: Rows, columns: Sequence[str], names: Mapping[str, str]) -> dict[str, str]:
    """The part of the names that a file has, each new name once."""
    own = {column: name for column, name in names.items() if column in columns}
    # Rows of a JSON file may have either key; a row with both is a bad row.
    after = list(own.values()) if rows.columns is None else [own.get(column, column) for column in columns]
    twice = next((name for name in own.values() if after.count(name) > 1), None)
    if twice is not None:
        both = " and ".join(repr(column) for column in columns if own.get(column, column) == twice)
        raise DataError(
            f"--columns: {rows.path} would have two columns {twice!r}, {both}, expected one. Leave one out, or rename "
            "it in the file."
        )
    return own


def _columns(rows: Rows) -> list[str]:
    """The columns of a table, or the keys of the first rows of a JSON file."""
    if rows.columns is not None:
        return list(rows.columns)
    keys: dict[str, None] = {}
    for index in range(min(len(rows), _LOOKED_AT)):
        try:
            row = rows[index]
        except RowError:
            continue  # the check of the rows reports it
        if isinstance(row, Mapping):
            keys |= dict.fromkeys(row)
    return list(keys)


def _paths(files: Iterable[Rows]) -> str:
    return ", ".join(str(Path(rows.path)) for rows in files)

"""Which key of a row, or column of a table, is the question, the answer, the picture: known pairs, and ``--columns``.

A question and its answer under keys of their own become ``messages``. Known pairs: ``user``/``assistant`` (the names
that ``--columns`` gives), alpaca's ``instruction``/``output`` with ``input``, ``query``/``response``,
``question``/``answer`` or ``answers``, and a picture or video with its ``caption`` or ``text``. A row that fits two
of them is refused: which one is meant can't be seen, and ``--columns`` says it. ``history`` holds earlier pairs,
``system`` the system turn, ``weight`` how much the answers count.

``--columns`` renames the columns of every file that has them; ``data/row_parsing.py`` knows the other names. In a CSV
file every cell is a text, so lists, objects and weights are read out of theirs.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from minicpm_tune.data.files.json_rows import Rows
from minicpm_tune.data.row_keys import NOTHING, ROW_KEYS, name_list, type_name
from minicpm_tune.errors import DataError, RowError

_MEDIA = ("image", "images", "video", "videos")


@dataclass(frozen=True)
class Form:
    """A pair of keys.

    Attributes:
        question: The key of the question; None: the question is to describe the row's picture.
        answer: The key of the answer.
        more: A key whose text follows the question on a line of its own.
    """

    question: str | None
    answer: str
    more: str | None = None

    def __str__(self) -> str:
        return f"'{self.question or 'image'}' and '{self.answer}'"

    def fits(self, row: Mapping[str, Any], *, answered: bool) -> bool:
        """Whether a row has both; without an answer the question is enough unless it must be ``answered``."""
        keys = _MEDIA if self.question is None else (self.question,)
        if not any(row.get(key) not in NOTHING for key in keys):
            return False
        return row.get(self.answer) is not None or (not answered and self.question is not None)


CHOSEN = Form("user", "assistant")  # by --columns, so it is never in doubt
FORMS = (
    Form("instruction", "output", more="input"),
    Form("query", "response"),
    Form("question", "answer"),
    Form("question", "answers"),
    Form(None, "caption"),
    Form(None, "text"),
)
KEYS = {"user", "assistant", "history", "weight", "input"} | {
    key for form in FORMS for key in (form.question, form.answer) if key is not None
}


def as_conversation(row: Any, *, answered: bool = True) -> Any:
    """Write a row of a known pair as a row with ``messages``; any other is given back as it is.

    Args:
        row: The parsed row.
        answered: Whether it must have an answer; a row for prediction may end with its question.

    Raises:
        RowError: When it fits two pairs, or a value of its pair can't be used.

    Example:
        >>> as_conversation({"image": "a.png", "question": "How many?", "answers": ["2", "two", "2"]})["messages"]
        [{'role': 'user', 'content': 'How many?'}, {'role': 'assistant', 'content': '2'}]
    """
    if not isinstance(row, Mapping) or any(
        row.get(key) not in NOTHING for key in ("conversations", "messages")
    ):
        return row
    form = _form_of(row, answered=answered)
    if form is None:
        return row
    used = {form.question, form.answer, form.more, "history", "weight", "conversations", "messages"}
    rest = {key: value for key, value in row.items() if key not in used}
    messages = [*_history(row.get("history")), _message("user", _question(form, row))]
    if row.get(form.answer) is not None:
        messages.append(_message("assistant", _answer(form, row)))
    weight = row.get("weight")
    if weight is not None:
        messages = [{**each, "weight": weight} if each["role"] == "assistant" else each for each in messages]
    return {**rest, "messages": messages}


def _form_of(row: Mapping[str, Any], *, answered: bool) -> Form | None:
    if CHOSEN.fits(row, answered=answered):
        return CHOSEN
    found = [form for form in FORMS if form.fits(row, answered=True)]
    if not found and not answered:
        found = [form for form in FORMS if form.fits(row, answered=False)]
        questions = {form.question for form in found}
        found = found[:1] if len(questions) == 1 else found
    if len(found) > 1:  # columns of a table that this row leaves empty are in no one's way
        found = [form for form in found if row.get(form.answer) not in NOTHING] or found
    if len(found) > 1:
        first, second = found[:2]
        raise RowError(
            "form",
            f"the row has {first}, and {second}, expected one pair: which is meant can't be told. Remove one, or "
            f'name the columns: --columns \'{{"{first.question or "QUESTION"}": "user", "{first.answer}": '
            '"assistant"}\'.',
        )
    return found[0] if found else None


def _question(form: Form, row: Mapping[str, Any]) -> str:
    if form.question is None:
        kind = next(key for key in _MEDIA if row.get(key) not in NOTHING)
        value = row[kind]
        one = isinstance(value, Mapping) and {"bytes", "path"} & set(
            value
        )  # as Hugging Face's data sets store it
        several = isinstance(value, (list, tuple, Mapping)) and len(value) > 1 and kind.startswith("image")
        return "Describe the images." if several and not one else f"Describe the {kind.removesuffix('s')}."
    question = _text(row[form.question], form.question)
    more = None if form.more is None else row.get(form.more)
    return question if more in NOTHING else f"{question}\n{_text(more, str(form.more))}"


def _answer(form: Form, row: Mapping[str, Any]) -> str:
    value = row[form.answer]
    if form.answer != "answers" or not isinstance(value, (list, tuple)):
        return _text(value, form.answer)
    # VQA: several people's answers, plain or as {"answer": ...}; most of them gave this one, the first of equals.
    texts = [_text(each.get("answer") if isinstance(each, Mapping) else each, form.answer) for each in value]
    if not texts:
        raise RowError(
            "form", "'answers' is empty, expected at least one answer. Add one, or remove the row."
        )
    return Counter(texts).most_common(1)[0][0]


def _history(value: Any) -> list[dict[str, Any]]:
    if value in NOTHING:
        return []
    pairs = value if isinstance(value, (list, tuple)) else [value]
    messages = []
    for number, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError(
                "form",
                f'\'history\' {number} is {pair!r:.80}, expected a question and its answer: [["...", "..."], ...]. '
                "Fix it.",
            )
        question, answer = (_text(each, f"history {number}") for each in pair)
        messages += [_message("user", question), _message("assistant", answer)]
    return messages


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _text(value: Any, key: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise RowError(
        "form", f"{key!r} is {type_name(value)}, expected a text. Write one, or one row for each of several."
    )


def form_names(row: Mapping[str, Any]) -> str:
    """What a row without a conversation was expected to have, for the message about its keys."""
    return (
        f"the row has the keys {name_list(row)}, expected 'conversations' or 'messages', or a pair such as "
        f"{FORMS[2]} or {FORMS[1]}. Add the conversation, or name the columns: "
        '--columns \'{"...": "user", "...": "assistant"}\'.'
    )


# --- --columns ---

TARGETS = tuple(sorted(ROW_KEYS | KEYS | {"audio", "audios"}))
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
        listed, paths = ", ".join(map(repr, missing)), ", ".join(str(rows.path) for rows in files)
        raise DataError(
            f"--columns: no column {listed} in {paths}, expected those found: {name_list(found, most=40)}. "
            "Fix the name, or leave it out."
        )
    own = [_for_file(rows, each, names) for rows, each in zip(files, columns, strict=True)]
    return [
        NamedRows(rows, renamed) if renamed or rows.text_cells else rows
        for rows, renamed in zip(files, own, strict=True)
    ]


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
        with suppress(RowError):  # the check of the rows reports it
            row = rows[index]
            keys |= dict.fromkeys(row if isinstance(row, Mapping) else ())
    return list(keys)

"""Rows that are a question and its answer under keys of their own -> rows with ``messages``.

Known pairs: ``user``/``assistant`` (the names that ``--columns`` gives), alpaca's ``instruction``/``output`` with
``input``, ``query``/``response``, ``question``/``answer`` or ``answers``, and a picture or video with its ``caption``
or ``text``. A row that fits two of them is refused: which one is meant can't be seen, and ``--columns`` says it.
``history`` holds earlier pairs, ``system`` the system turn, ``weight`` how much the answers count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minicpm_tune.data.row_keys import NOTHING, name_list, type_name
from minicpm_tune.errors import RowError

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
        if self.question is None:
            has_question = any(row.get(key) not in NOTHING for key in _MEDIA)
        else:
            has_question = row.get(self.question) not in NOTHING
        return has_question and (
            row.get(self.answer) is not None or (not answered and self.question is not None)
        )


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
        several = (
            isinstance(row[kind], (list, tuple, Mapping)) and len(row[kind]) > 1 and kind.startswith("image")
        )
        if several and isinstance(row[kind], Mapping) and {"bytes", "path"} & set(row[kind]):
            several = False  # one picture, as Hugging Face's data sets store it
        return "Describe the images." if several else f"Describe the {kind.removesuffix('s')}."
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

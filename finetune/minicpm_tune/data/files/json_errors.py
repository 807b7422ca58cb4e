"""Saying what is wrong with a broken JSON text, and how its line should read.

The example in the official guides is no JSON: it has single quotes and commas before closing brackets. Users
copy it; so these two are named and the corrected line is shown.
"""

from __future__ import annotations

import ast
import json
import re

_SINGLE_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'")
_DOUBLE_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_LONGEST_LINE = 10**6  # characters
_AROUND = 50  # characters shown on either side of a place in a longer line
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null", "NaN": "null"}


def explain(text: str, error: json.JSONDecodeError, *, first_line: int = 1) -> str:
    """Describe a JSON error: the place, the line, and the line corrected where that is possible.

    Args:
        text: The text that was parsed.
        error: What ``json`` said.
        first_line: The number of the text's first line in its file.

    Returns:
        Lines for a message.

    Example:
        >>> try:
        ...     json.loads("{'role': 'user'}")
        ... except json.JSONDecodeError as error:
        ...     print(explain("{'role': 'user'}", error))
        line 1, column 2: found a single quote, expected a double quote.
          found: {'role': 'user'}
          fixed: {"role": "user"}
    """
    position, found, expected = _diagnosis(text, error)
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    end = len(text) if end < 0 else end
    number = first_line + text.count("\n", 0, position)
    message = f"line {number}, column {position - start + 1}: found {found}, expected {expected}."
    if end - start > _LONGEST_LINE:  # nobody reads it, and correcting it takes minutes
        return (
            f"{message}\n  found there: {text[max(start, position - _AROUND) : min(end, position + _AROUND)]}"
        )
    line = text[start:end]
    shown = line.strip()
    message += f"\n  found: {_cut(shown)}"
    comma = (
        position - start - (len(line) - len(line.lstrip())) if text[position : position + 1] == "," else None
    )
    fixed = _fixed(shown, drop_comma_at=comma)
    return message if fixed == shown else f"{message}\n  fixed: {_cut(fixed)}"


def _diagnosis(text: str, error: json.JSONDecodeError) -> tuple[int, str, str]:
    """The position to point at, what stands there, and what should."""
    position = min(error.pos, len(text))
    before = text[:position].rstrip()
    here = text[position : position + 1]
    if before.endswith(",") and here in "]}":
        return len(before) - 1, f"a comma before {here!r}", "none after the last item"
    if here == "," and text[position + 1 :].lstrip()[:1] in ("]", "}"):
        return position, "a comma before a closing bracket", "none after the last item"
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


def _fixed(line: str, *, drop_comma_at: int | None) -> str:
    """The line with double quotes, JSON's words, and without the comma that should not be there."""
    if drop_comma_at is not None and line[drop_comma_at : drop_comma_at + 1] == ",":
        line = line[:drop_comma_at] + line[drop_comma_at + 1 :]
    pieces = re.split(f"({_DOUBLE_QUOTED.pattern})", line)
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            piece = _SINGLE_QUOTED.sub(_double_quoted, piece)
            pieces[index] = re.sub(r",(\s*[\]}])", r"\1", _with_json_words(piece))
    return "".join(pieces)


def _double_quoted(found: re.Match[str]) -> str:
    try:
        return json.dumps(ast.literal_eval(found.group()), ensure_ascii=False)
    except (SyntaxError, ValueError):
        return found.group()


def _with_json_words(piece: str) -> str:
    if '"' in piece:
        return piece
    return re.sub(r"\b(True|False|None|NaN)\b", lambda word: _PYTHON_WORDS[word.group()], piece)


def _cut(line: str) -> str:
    return line if len(line) <= 200 else f"{line[:200]} ..."

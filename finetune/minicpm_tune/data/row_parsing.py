"""One row of a data file, in any of the accepted forms -> turns and the sources of their media.

Accepted: the official form (``conversations`` with role/content, ``image`` a path or a dictionary of
``<image_00>`` placeholders), ``messages`` with strings or lists of typed parts, ShareGPT / LLaVA
(``from``/``value``), and InternLM-XComposer's ``<ImageHere>``. A row is used exactly as written, or refused
with a ``RowError`` that says what was found, what was expected and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minicpm_tune.data.media_references import MARKS, MediaReader, Source, a, listed
from minicpm_tune.data.turns import Media, Part, Turn
from minicpm_tune.errors import RowError

_ROLE_NAMES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system",
}  # fmt: skip
_TOOL_ROLES = ("tool", "tool_call", "tool_response", "function", "function_call", "observation", "ipython")
_PART_SOURCES = {
    "image": ("image", "path", "url", "image_url", "data", "base64"),
    "video": ("video", "path", "url", "video_url"),
}
_LONGEST_TEXT = 10**7  # characters; a million tokens have fewer


@dataclass(frozen=True)
class ParsedRow:
    """A row as turns.

    Attributes:
        turns: The turns; media are numbered in the order of the text.
        sources: The source of every medium, by ``Media.index``; one mentioned twice is there twice.
        row_id: The row's ``id``, if it has one.
    """

    turns: tuple[Turn, ...]
    sources: tuple[Source, ...]
    row_id: Any = None


def parse_row(row: Any, *, image_end: str = "\n") -> ParsedRow:
    """Read one row.

    Args:
        row: The parsed JSON value.
        image_end: What follows an image that no placeholder mentions.

    Returns:
        The conversation, its last turn the assistant's.

    Raises:
        RowError: When the row is not in an accepted form.

    Example:
        >>> row = {"image": "cat.jpg", "conversations": [
        ...     {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]}
        >>> parse_row(row).turns[0].parts
        (Media(kind='image', index=0), '\\nWhat is it?')
    """
    if not isinstance(row, Mapping):
        raise RowError(
            "form", f"the row is {a(row)}, expected an object with 'conversations'. Fix or remove it."
        )
    messages = _messages(row)
    reader = MediaReader(row)
    turns = [_read_turn(message, number, reader) for number, message in enumerate(messages)]
    _check_order(turns)
    turns = reader.put_unmentioned_first(turns, image_end)
    return ParsedRow(*_numbered(turns), row.get("id"))


def _messages(row: Mapping[str, Any]) -> Sequence[Any]:
    for key in ("conversations", "messages"):
        if row.get(key) is not None:
            messages = row[key]
            break
    else:
        raise RowError(
            "form",
            f"the row has the keys {listed(row)}, expected 'conversations' or 'messages'. Add the "
            "conversation.",
        )
    if not isinstance(messages, (list, tuple)):
        raise RowError(
            "form", f"{key!r} is {a(messages)}, expected a list of messages. Put the messages in a list."
        )
    if not messages:
        raise RowError(
            "form", f"{key!r} is empty, expected at least a question and an answer. Remove the row."
        )
    return messages


# --- turns ---


def _read_turn(message: Any, number: int, media: MediaReader) -> Turn:
    if not isinstance(message, Mapping):
        raise RowError(
            "form", f"turn {number} is {a(message)}, expected an object with 'role' and 'content'. Fix it."
        )
    role = _role(message, number)
    content = _first(message, "content", "value")
    learn = message.get("loss", True)
    if learn not in (True, False, 0, 1, None):
        raise RowError(
            "form",
            f"turn {number}: 'loss' is {learn!r}, expected true or false. Say whether the turn is learned.",
        )
    if message.get("tool_calls"):
        raise RowError(
            "role", f"turn {number} has 'tool_calls', expected text only. Tool use can't be trained here."
        )
    parts: list[Any] = _read_content(content, number, media)  # sources become media in _numbered
    return Turn(role, tuple(parts), learn is None or bool(learn))


def _first(message: Mapping[str, Any], *keys: str) -> Any:
    """The first of some keys that is there; Parquet fills in nulls for the others."""
    return next((message[key] for key in keys if message.get(key) is not None), None)


def _role(message: Mapping[str, Any], number: int) -> str:
    name = _first(message, "role", "from")
    if name in _TOOL_ROLES:
        raise RowError(
            "role",
            f"turn {number} has role {name!r}, expected 'user' or 'assistant'. Tool turns can't be trained "
            "here: "
            "write the tool's result into a user turn, or remove the row.",
        )
    if not isinstance(name, str) or name not in _ROLE_NAMES:
        raise RowError(
            "role",
            f"turn {number} has role {name!r}, expected 'user', 'assistant' or 'system' "
            "(or 'human' and 'gpt'). Rename the role.",
        )
    return _ROLE_NAMES[name]


def _read_content(content: Any, number: int, media: MediaReader) -> list[Part | Source]:
    if isinstance(content, str):
        return _read_text(content, number, media)
    if not isinstance(content, (list, tuple)):
        raise RowError(
            "form", f"turn {number}: the content is {a(content)}, expected a text or a list of parts. Fix it."
        )
    parts: list[Part | Source] = []
    for part in content:
        parts += _read_part(part, number, media)
    return parts


def _read_part(part: Any, number: int, media: MediaReader) -> list[Part | Source]:
    if isinstance(part, str):
        return _read_text(part, number, media)
    kind = part.get("type") if isinstance(part, Mapping) else None
    kind = kind.removesuffix("_url") if isinstance(kind, str) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return _read_text(part["text"], number, media)
    if kind not in _PART_SOURCES:
        found = repr(part.get("type")) if isinstance(part, Mapping) else a(part)
        raise RowError(
            "form",
            f"turn {number}: a content part of type {found}, expected 'text', 'image' or 'video'. Fix its "
            "'type'.",
        )
    for key in _PART_SOURCES[kind]:
        if part.get(key) is not None:
            value = part[key]
            return [Source(kind, value["url"] if isinstance(value, Mapping) and "url" in value else value)]
    return [media.take(f"<{kind}>", number)]


def _read_text(text: str, number: int, media: MediaReader) -> list[Part | Source]:
    if len(text) > _LONGEST_TEXT:
        raise RowError(
            "form",
            f"turn {number}: a text of {len(text)} characters, expected at most {_LONGEST_TEXT}. No model reads that "
            "much; split it, or look for a line break that is missing.",
        )
    parts: list[Part | Source] = []
    position = 0
    for mark in MARKS.finditer(text):
        if mark.start() > position:
            parts.append(text[position : mark.start()])
        parts.append(media.take(mark.group(), number))
        position = mark.end()
    if position < len(text):
        parts.append(text[position:])
    return parts


def _check_order(turns: Sequence[Turn]) -> None:
    spoken = turns[1:] if turns[0].role == "system" else turns
    for offset, turn in enumerate(spoken):
        expected = "assistant" if offset % 2 else "user"
        if turn.role != expected:
            number = offset + len(turns) - len(spoken)
            raise RowError(
                "role",
                f"turn {number} has role {turn.role!r}, expected {expected!r}. After an optional system "
                "turn, "
                "user and assistant alternate, starting with 'user': join or remove the extra turn.",
            )
    if not spoken or spoken[-1].role != "assistant":
        raise RowError(
            "role",
            f"the last turn (turn {len(turns) - 1}) has role {turns[-1].role!r}, expected 'assistant'. "
            "End the conversation with an answer.",
        )


def _numbered(turns: Sequence[Turn]) -> tuple[tuple[Turn, ...], tuple[Source, ...]]:
    """Number the media in the order of the text, and join texts that touch."""
    sources: list[Source] = []
    numbered: list[Turn] = []
    for turn in turns:
        parts: list[Part] = []
        for part in turn.parts:
            before = parts[-1] if parts else None
            if isinstance(part, Source):
                parts.append(Media(part.kind, len(sources)))
                sources.append(part)
            elif isinstance(part, str) and isinstance(before, str):
                parts[-1] = before + part
            else:
                parts.append(part)
        numbered.append(Turn(turn.role, tuple(parts), turn.learn))
    return tuple(numbered), tuple(sources)

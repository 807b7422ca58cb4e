"""One row of a data file, in any of the accepted forms -> turns and the sources of their media.

Accepted: the official form (``conversations`` with role/content, ``image`` a path or a dictionary of
``<image_00>`` placeholders), ``messages`` with strings or lists of typed parts, ShareGPT / LLaVA
(``from``/``value``), InternLM-XComposer's ``<ImageHere>``, and the pairs of ``files/row_forms.py``. A row is used
exactly as written, or refused with a ``RowError`` that says what was found, what was expected and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from minicpm_tune.data.files.row_forms import as_conversation, form_names
from minicpm_tune.data.objects import BOX_MARK, REF_MARK
from minicpm_tune.data.row_keys import (
    NOTHING,
    PART_SOURCES,
    name_list,
    read_message_keys,
    read_part_keys,
    read_row_keys,
    type_name,
)
from minicpm_tune.data.turns import MediaReader, Part, Source, Turn, numbered_media, placed_boxes
from minicpm_tune.errors import RowError

_ROLE_NAMES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system",
}  # fmt: skip
_TOOL_ROLES = ("tool", "tool_call", "tool_response", "function", "function_call", "observation", "ipython")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_SWITCHES, _WEIGHTS = ("loss", "train"), ("weight", "loss_scale")
_LARGEST_WEIGHT = 1000  # a larger one is a mistake, and in a batch it leaves nothing of the others
_LONGEST_TEXT = 10**7  # characters; a million tokens have fewer


@dataclass(frozen=True)
class ParsedRow:
    """A row as turns.

    Attributes:
        turns: The turns; media are numbered in the order of the text.
        sources: The source of every medium, by ``Media.index``; one mentioned twice is there twice.
        row_id: The row's ``id``, if it has one.
        unknown_keys: Keys that nothing reads, such as ``row 'license'`` or ``message 'name'``, each once.
    """

    turns: tuple[Turn, ...]
    sources: tuple[Source, ...]
    row_id: Any = None
    unknown_keys: tuple[str, ...] = ()


def parse_row(
    row: Any,
    *,
    image_end: str = "\n",
    literal_control_tokens: bool = False,
    model: str = "the model",
    hears: bool = False,
    video_sound: bool = False,
) -> ParsedRow:
    """Read one row.

    Args:
        row: The parsed JSON value.
        image_end: What follows an image that no placeholder mentions.
        literal_control_tokens: Whether control texts in messages are plain text, unless the row says otherwise.
        model: What messages call the model.
        hears: Whether the model takes audio.
        video_sound: Whether videos are taken with their sound, unless the row says otherwise.

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
            "form", f"the row is {type_name(row)}, expected an object with 'conversations'. Fix or remove it."
        )
    row = as_conversation(row)
    literal = _switch(row, "literal_control_tokens", "the row", literal_control_tokens)
    sound = _switch(row, "use_audio", "the row", video_sound)
    reader = _RowReader(MediaReader(row, literal=literal, hears=hears, sound=sound), model)
    reader.note("row", read_row_keys(row, model=model, hears=hears))
    read = {number: reader.turn(message, number) for number, message in enumerate(_messages(row))}
    spoken = {number: turn for number, turn in read.items() if turn is not None}
    _check_order(spoken)
    turns = reader.media.put_unmentioned_first(_with_system(list(spoken.values()), row), image_end)
    reader.media.objects.check_all_taken()
    numbered, sources = numbered_media(turns)
    if row.get("use_audio") and not any(source.kind == "video" for source in sources):
        raise RowError(
            "media",
            "the row has 'use_audio' but no video whose sound it could mean. Add the video, or remove the key.",
        )
    placed = placed_boxes(numbered, sources, reader.media.images)
    return ParsedRow(placed, sources, row.get("id"), tuple(reader.unknown))


def _messages(row: Mapping[str, Any]) -> Sequence[Any]:
    given = {key: row[key] for key in ("conversations", "messages") if row.get(key) is not None}
    filled = {key: value for key, value in given.items() if value not in NOTHING}
    if not given:
        raise RowError("form", form_names(row))
    if len(filled) > 1:
        raise RowError(
            "form", "the row has both 'conversations' and 'messages', expected one. Remove one of them."
        )
    key, messages = next(iter((filled or given).items()))
    if not isinstance(messages, (list, tuple)):
        raise RowError(
            "form",
            f"{key!r} is {type_name(messages)}, expected a list of messages. Put the messages in a list.",
        )
    if not messages:
        raise RowError(
            "form", f"{key!r} is empty, expected at least a question and an answer. Remove the row."
        )
    return messages


def _with_system(turns: list[Turn], row: Mapping[str, Any]) -> list[Turn]:
    """Put the row's ``system`` in front of its turns."""
    for key in ("system", "system_prompt"):
        text = row.get(key)
        if text in NOTHING:
            continue
        if not isinstance(text, str):
            raise RowError("form", f"{key!r} is {type_name(text)}, expected a text. Fix it.")
        if turns[0].role != "system":
            turns = [Turn("system", (text,), literal=turns[0].literal), *turns]
        elif turns[0].text != text:
            raise RowError(
                "form", f"the row has {key!r} and a system turn, expected one of them. Remove one."
            )
    return turns


class _RowReader:
    """Reads the messages of one row, and notes the keys that nothing reads."""

    def __init__(self, media: MediaReader, model: str) -> None:
        self.media, self.model = media, model
        self.unknown: dict[str, None] = {}

    def note(self, place: str, keys: Sequence[str]) -> None:
        self.unknown |= {f"{place} {key!r}": None for key in keys}

    def turn(self, message: Any, number: int) -> Turn | None:
        """Read a message; None for a system message without content."""
        if not isinstance(message, Mapping):
            raise RowError(
                "form",
                f"turn {number} is {type_name(message)}, expected an object with 'role' and 'content'. Fix it.",
            )
        self.note("message", read_message_keys(message, number, model=self.model, hears=self.media.hears))
        role = _role(message, number)
        content = _one_of(message, ("content", "value"), number)
        if content is None and role == "system":
            return None
        thoughts = _thoughts(message, role, number)
        if content is None and thoughts is not None:
            raise RowError(
                "form", f"turn {number} has thoughts and no content, expected an answer. Add the answer."
            )
        if thoughts and self.media.objects and any(mark in thoughts for mark in (REF_MARK, BOX_MARK)):
            raise RowError(
                "boxes",
                f"turn {number} has {REF_MARK} or {BOX_MARK} in thoughts under a key of their own, expected them in "
                "the content. Write the thoughts into the answer, as <think>...</think>.",
            )
        weight = _weight(message, role, number)
        parts: list[Any] = self._content(content, number)  # sources become media in numbered_media
        return Turn(role, tuple(parts), weight, thoughts, self.media.literal)

    def _content(self, content: Any, number: int) -> list[Part | Source]:
        if isinstance(content, str):
            content = [content]
        if not isinstance(content, (list, tuple)):
            raise RowError(
                "form",
                f"turn {number}: the content is {type_name(content)}, expected a text or a list of parts. Fix it.",
            )
        parts: list[Part | Source] = []
        for part in content:
            parts += self._text(part, number) if isinstance(part, str) else self._part(part, number)
        return parts

    def _part(self, part: Any, number: int) -> list[Part | Source]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        kind = kind.removesuffix("_url") if isinstance(kind, str) else None
        if kind in ("audio", "input_audio"):
            if self.media.hears:
                return [self._medium(part, "audio", number)]
            raise RowError(
                "audio",
                f"turn {number}: a content part of type {part['type']!r}, expected 'text', 'image' or 'video': "
                f"{self.model} takes no audio. Remove the row.",
            )
        if kind not in ("image", "video") and not (kind == "text" and isinstance(part.get("text"), str)):
            found = repr(part.get("type")) if isinstance(part, Mapping) else type_name(part)
            raise RowError(
                "form",
                f"turn {number}: a content part of type {found}, expected 'text', 'image' or 'video'. Fix its 'type'.",
            )
        self.note("part", read_part_keys(part, kind, number))
        return self._text(part["text"], number) if kind == "text" else [self._medium(part, kind, number)]

    def _medium(self, part: Mapping[str, Any], kind: str, number: int) -> Source:
        given = [part[key] for key in PART_SOURCES[kind] if part.get(key) is not None]
        index = None if given and kind == "audio" else part.get("index")
        if len(given) > 1 or (given and index is not None):
            raise RowError(
                "media",
                f"turn {number}: a part names its {kind} more than once, expected one name. Keep one.",
            )
        if given:
            source = Source(kind, _inner(given[0], kind))
        elif index is not None:
            source = self.media.at(kind, index, f"asks for the {kind} with index {index!r}", number)
        else:
            source = self.media.take(f"<{kind}>", number)
        if kind != "video":
            return source
        fps = _positive(part, ("fps", "video_fps"), number)
        most = _positive(part, ("max_frames", "max_num_frames"), number)
        return replace(
            source,
            fps=fps,
            max_frames=None if most is None else max(int(most), 1),
            sound=_switch(part, "use_audio", f"turn {number}", self.media.sound),
        )

    def _text(self, text: str, number: int) -> list[Part | Source]:
        if len(text) > _LONGEST_TEXT:
            raise RowError(
                "form",
                f"turn {number}: a text of {len(text)} characters, expected at most {_LONGEST_TEXT}. No model reads "
                "that much; split it, or look for a line break that is missing.",
            )
        return list(self.media.split(text, number))


def _inner(value: Any, kind: str) -> Any:
    """What a part names, without the object that ``image_url``, ``input_audio`` and the like wrap it in once more."""
    if not isinstance(value, Mapping) or (kind == "audio" and {"bytes", "path", "array"} & set(value)):
        return value
    if kind == "audio" and isinstance(value.get("data"), str):  # base64 without the head of a data URI
        return f"data:audio/{value.get('format', 'wav')};base64,{value['data']}"
    return value.get("url", value)


def _one_of(message: Mapping[str, Any], keys: Sequence[str], number: int) -> Any:
    """The value of whichever key is there; Parquet fills in nulls for the others."""
    given = {key: message[key] for key in keys if message.get(key) is not None}
    values = list(given.values())
    if any(value != values[0] for value in values[1:]):
        names = " and ".join(map(repr, given))
        raise RowError("form", f"turn {number} has {names} with different values, expected one. Remove one.")
    return values[0] if values else None


def _role(message: Mapping[str, Any], number: int) -> str:
    names = {key: _ROLE_NAMES.get(message[key], message[key]) for key in ("role", "from")
             if isinstance(message.get(key), str)}  # fmt: skip
    name = _one_of(names or message, ("role", "from"), number)
    if name in _TOOL_ROLES:
        raise RowError(
            "role",
            f"turn {number} has role {name!r}, expected 'user' or 'assistant'. Tool turns can't be trained here: write "
            "the tool's result into a user turn, or remove the row.",
        )
    if not isinstance(name, str) or name not in _ROLE_NAMES:
        raise RowError(
            "role",
            f"turn {number} has role {name!r}, expected 'user', 'assistant' or 'system' (or 'human' and 'gpt'). Rename "
            "the role.",
        )
    return _ROLE_NAMES[name]


def _weight(message: Mapping[str, Any], role: str, number: int) -> float:
    """How much an answer counts: ``loss`` or ``train`` true or false, ``weight`` or ``loss_scale`` a number."""
    given = [key for key in (*_SWITCHES, *_WEIGHTS) if message.get(key) is not None]
    switches = {_switch(message, key, f"turn {number}") for key in _SWITCHES if key in given}
    weights = {_number(message[key], f"turn {number}: {key!r}") for key in _WEIGHTS if key in given}
    if len(weights) > 1 or len(switches | set(map(bool, weights))) > 1:
        raise RowError("form", f"turn {number}: {name_list(given)} contradict each other. Keep one of them.")
    weight = weights.pop() if weights else 1.0
    if role != "assistant" and weight not in (0, 1):
        raise RowError(
            "form",
            f"turn {number} has a weight of {weight:g} and the role {role!r}, expected a weight on an answer: only "
            "answers are learned. Remove it.",
        )
    return 0.0 if False in switches else weight


def _number(value: Any, name: str) -> float:
    if not isinstance(value, (bool, int, float)) or not 0 <= value <= _LARGEST_WEIGHT:
        raise RowError(
            "form",
            f"{name} is {value!r:.80}, expected a number from 0 (not learned) to {_LARGEST_WEIGHT:,}. Fix it.",
        )
    return float(value)


def _switch(values: Mapping[str, Any], key: str, place: str, default: bool = True) -> bool:
    """What a key says that is true or false."""
    value = values.get(key)
    if value is None:
        return default
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise RowError(
            "form", f"{place}: {key!r} is {value!r:.80}, expected true or false (or 1 or 0). Fix it."
        )
    return bool(value)


def _thoughts(message: Mapping[str, Any], role: str, number: int) -> str | None:
    """What is thought before an answer, where it stands under a key of its own."""
    given = {key: message[key] for key in _THOUGHTS if message.get(key) not in NOTHING}
    if not given:
        return None
    text = _one_of(given, _THOUGHTS, number)
    if role != "assistant" or not isinstance(text, str):
        key = next(iter(given))
        raise RowError(
            "thoughts",
            f"turn {number}: {key!r} is {type_name(text)} of role {role!r}, expected a text of the assistant. Fix it.",
        )
    return text if text.strip() else None


def _positive(part: Mapping[str, Any], keys: Sequence[str], number: int) -> float | None:
    value = _one_of(part, keys, number)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        key = next(key for key in keys if part.get(key) is not None)
        raise RowError("form", f"turn {number}: {key!r} is {value!r:.80}, expected a number above 0. Fix it.")
    return value


def _check_order(turns: Mapping[int, Turn]) -> None:
    """See that user and assistant alternate; the keys are the turns' numbers in the row."""
    if not turns:
        raise RowError(
            "form", "the row has no turn with content, expected a question and an answer. Remove it."
        )
    (_, first), *rest = turns.items()
    for place, (number, turn) in enumerate(rest if first.role == "system" else turns.items()):
        expected = "assistant" if place % 2 else "user"
        if turn.role != expected:
            raise RowError(
                "role",
                f"turn {number} has role {turn.role!r}, expected {expected!r}. After an optional system turn, user and "
                "assistant alternate, starting with 'user': join or remove the extra turn.",
            )
    number, last = list(turns.items())[-1]
    if last.role != "assistant":
        raise RowError(
            "role",
            f"the last turn (turn {number}) has role {last.role!r}, expected 'assistant'. End the "
            "conversation with an answer.",
        )

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
from minicpm_tune.data.grounding import BOX_MARK, REF_MARK, Box
from minicpm_tune.data.row_keys import (
    NOTHING,
    PART_SOURCES,
    name_list,
    read_message_keys,
    read_part_keys,
    read_row_keys,
    type_name,
)
from minicpm_tune.data.turns import Literal, Media, MediaReader, Part, Source, Turn
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
    literal = row.get("literal_control_tokens")
    literal = (
        literal_control_tokens if literal is None else _switch(literal, "the row: 'literal_control_tokens'")
    )
    asked = row.get("use_audio")
    sound = video_sound if asked is None else _switch(asked, "the row: 'use_audio'")
    media = MediaReader(row, literal=literal, hears=hears, sound=sound)
    reader = _RowReader(media, literal=literal, model=model, hears=hears)
    reader.note("row", read_row_keys(row, model=model, hears=hears))
    read = [reader.turn(message, number) for number, message in enumerate(_messages(row))]
    numbers = [number for number, turn in enumerate(read) if turn is not None]
    turns = [turn for turn in read if turn is not None]
    _check_order(turns, numbers)
    turns = reader.media.put_unmentioned_first(_with_system(turns, row), image_end)
    reader.media.objects.check_all_taken()
    numbered, sources = _numbered(turns)
    if asked and not any(source.kind == "video" for source in sources):
        raise RowError(
            "media",
            "the row has 'use_audio' but no video whose sound it could mean. Add the video, or remove the key.",
        )
    numbered = _with_images_of_boxes(numbered, sources, reader.media.images)
    return ParsedRow(numbered, sources, row.get("id"), tuple(reader.unknown))


def _messages(row: Mapping[str, Any]) -> Sequence[Any]:
    given = [key for key in ("conversations", "messages") if row.get(key) is not None]
    if not given:
        raise RowError(
            "form",
            form_names(row),
        )
    if len(given) > 1 and row["conversations"] not in NOTHING and row["messages"] not in NOTHING:
        raise RowError(
            "form", "the row has both 'conversations' and 'messages', expected one. Remove one of them."
        )
    key = next((key for key in given if row[key] not in NOTHING), given[0])
    messages = row[key]
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

    def __init__(self, media: MediaReader, *, literal: bool, model: str, hears: bool) -> None:
        self.media, self.literal, self.model, self.hears = media, literal, model, hears
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
        self.note("message", read_message_keys(message, number, model=self.model, hears=self.hears))
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
        parts: list[Any] = self._content(content, number)  # sources become media in _numbered
        return Turn(role, tuple(parts), weight, thoughts, self.literal)

    def _content(self, content: Any, number: int) -> list[Part | Source]:
        if isinstance(content, str):
            return self._text(content, number)
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
        if kind in ("audio", "input_audio") and self.hears:
            return [self._audio(part, number)]
        if kind in ("audio", "input_audio"):
            raise RowError(
                "audio",
                f"turn {number}: a content part of type {part['type']!r}, expected 'text', 'image' or 'video': "
                f"{self.model} takes no audio. Remove the row.",
            )
        if kind == "text" and isinstance(part.get("text"), str):
            self.note("part", read_part_keys(part, kind, number))
            return self._text(part["text"], number)
        if kind not in PART_SOURCES:
            found = repr(part.get("type")) if isinstance(part, Mapping) else type_name(part)
            raise RowError(
                "form",
                f"turn {number}: a content part of type {found}, expected 'text', 'image' or 'video'. Fix its 'type'.",
            )
        self.note("part", read_part_keys(part, kind, number))
        return [self._medium(part, kind, number)]

    def _audio(self, part: Mapping[str, Any], number: int) -> Source:
        keys = ("audio", "input_audio", "audio_url", "path", "url", "data")
        values = [part[key] for key in keys if part.get(key) is not None]
        if len(values) > 1:
            raise RowError(
                "media", f"turn {number}: a part names its audio more than once, expected one name. Keep one."
            )
        if values:
            return Source("audio", _inner_audio(values[0]))
        if part.get("index") is not None:
            index = part["index"]
            return Source(
                "audio", self.media.at("audio", index, f"asks for the audio with index {index!r}", number)
            )
        return self.media.take("<audio>", number)

    def _medium(self, part: Mapping[str, Any], kind: str, number: int) -> Source:
        given = [part[key] for key in PART_SOURCES[kind] if part.get(key) is not None]
        index = part.get("index")
        if len(given) > 1 or (given and index is not None):
            raise RowError(
                "media",
                f"turn {number}: a part names its {kind} more than once, expected one name. Keep one.",
            )
        if given:
            [value] = given
            source = Source(kind, value["url"] if isinstance(value, Mapping) and "url" in value else value)
        elif index is not None:
            source = Source(
                kind, self.media.at(kind, index, f"asks for the {kind} with index {index!r}", number)
            )
        else:
            source = self.media.take(f"<{kind}>", number)
        if kind == "image":
            return source
        fps = _positive(part, ("fps", "video_fps"), number)
        most = _positive(part, ("max_frames", "max_num_frames"), number)
        sound = part.get("use_audio")
        return replace(
            source,
            fps=fps,
            max_frames=None if most is None else max(int(most), 1),
            sound=self.media.sound if sound is None else _switch(sound, f"turn {number}: 'use_audio'"),
        )

    def _text(self, text: str, number: int) -> list[Part | Source]:
        if len(text) > _LONGEST_TEXT:
            raise RowError(
                "form",
                f"turn {number}: a text of {len(text)} characters, expected at most {_LONGEST_TEXT}. No model reads "
                "that much; split it, or look for a line break that is missing.",
            )
        return list(self.media.split(text, number))


def _inner_audio(value: Any) -> Any:
    """The audio of ``audio_url`` and ``input_audio`` parts, which wrap it once more."""
    if isinstance(value, Mapping) and not {"bytes", "path", "array"} & set(value):
        if isinstance(value.get("data"), str):  # base64 without the head of a data URI
            return f"data:audio/{value.get('format', 'wav')};base64,{value['data']}"
        return value.get("url", value)
    return value


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
    values = {key: message[key] for key in (*_SWITCHES, *_WEIGHTS) if message.get(key) is not None}
    switches = {_switch(values[key], f"turn {number}: {key!r}") for key in _SWITCHES if key in values}
    weights = {_number(values[key], f"turn {number}: {key!r}") for key in _WEIGHTS if key in values}
    if len(weights) > 1 or len(switches | set(map(bool, weights))) > 1:
        raise RowError("form", f"turn {number}: {name_list(values)} contradict each other. Keep one of them.")
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


def _switch(value: Any, name: str) -> bool:
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise RowError("form", f"{name} is {value!r:.80}, expected true or false (or 1 or 0). Fix it.")
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


def _check_order(turns: Sequence[Turn], numbers: Sequence[int]) -> None:
    """See that user and assistant alternate; ``numbers`` are the turns' numbers in the row."""
    if not turns:
        raise RowError(
            "form", "the row has no turn with content, expected a question and an answer. Remove it."
        )
    spoken = turns[1:] if turns[0].role == "system" else turns
    for offset, turn in enumerate(spoken):
        expected = "assistant" if offset % 2 else "user"
        if turn.role != expected:
            number = numbers[offset + len(turns) - len(spoken)]
            raise RowError(
                "role",
                f"turn {number} has role {turn.role!r}, expected {expected!r}. After an optional system turn, user and "
                "assistant alternate, starting with 'user': join or remove the extra turn.",
            )
    if not spoken or spoken[-1].role != "assistant":
        raise RowError(
            "role",
            f"the last turn (turn {numbers[-1]}) has role {turns[-1].role!r}, expected 'assistant'. End the "
            "conversation with an answer.",
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
                parts.append(Media(part.kind, len(sources), part.sound))
                sources.append(part)
            elif isinstance(part, str) and isinstance(before, str):
                parts[-1] = before + part
            elif isinstance(part, Literal) and isinstance(before, Literal):
                parts[-1] = Literal(before.text + part.text)
            else:
                parts.append(part)
        numbered.append(replace(turn, parts=tuple(parts)))
    return tuple(numbered), tuple(sources)


def _with_images_of_boxes(
    turns: tuple[Turn, ...], sources: Sequence[Source], listed: Sequence[Any]
) -> tuple[Turn, ...]:
    """Have every box name its picture by its number among the media, in place of that among the row's images.

    Args:
        turns: The turns.
        sources: Where their media come from.
        listed: The images that the row lists; those of content parts follow, in the order of the text.
    """
    used = [(index, source.value) for index, source in enumerate(sources) if source.kind == "image"]
    images = [*listed, *(value for _, value in used if not any(value is each for each in listed))]

    def placed(part: Part) -> Part:
        if not isinstance(part, Box):
            return part
        if part.image >= len(images):
            raise RowError(
                "boxes",
                f"objects.image_id of box {part.number} is {part.image}, but the row has {len(images)} images, counted "
                "from 0. Fix the number, or add the image.",
            )
        return replace(part, image=next(index for index, value in used if value is images[part.image]))

    return tuple(replace(turn, parts=tuple(map(placed, turn.parts))) for turn in turns)

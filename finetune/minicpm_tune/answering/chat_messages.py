"""The released chat's ``msgs`` and ``image`` -> turns and pictures.

Source: ``chat`` in the released modeling_minicpmv.py of V-2 to V-4.5. A message is ``{"role", "content"}``;
the content is a text, or a list of PIL images and texts, which are joined by newlines, as in the official
data format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from minicpm_tune.data.media.images import Picture
from minicpm_tune.data.turns import ROLES, Media, Part, Turn
from minicpm_tune.errors import UserError

IMAGE_MARK = "<ImageHere>"  # how InternLM-XComposer2's users say where a picture stands


class MessageError(UserError):
    """Messages that can't be put to a model; the message says what to change."""


def read_messages(
    msgs: str | Sequence[Mapping[str, Any]],
    *,
    image: Image.Image | None = None,
    system_prompt: str = "",
    joined_by: str = "\n",
) -> tuple[list[Turn], list[Image.Image | Picture]]:
    """Read a conversation whose last message is the user's.

    Args:
        msgs: The messages, or their JSON.
        image: Stands in front of the first user message; None when the images are in the messages.
        system_prompt: Stands before all messages; empty for none.
        joined_by: What stands between the parts of a message; ``Generation.image_end``.

    Returns:
        The turns, and the pictures in the order of the text; images in mode RGB.

    Raises:
        MessageError: When a message is not in the released form.

    Example:
        >>> read_messages([{"role": "user", "content": "Who are you?"}])
        ([Turn(role='user', parts=('Who are you?',), learn=True)], [])
    """
    if isinstance(msgs, str):
        msgs = _parsed(msgs)
    if not isinstance(msgs, Sequence) or not msgs:
        raise MessageError(
            f"msgs: found {msgs!r:.80}, expected a list with at least one message. Add the question."
        )
    pictures: list[Image.Image | Picture] = []
    turns = [Turn("system", (system_prompt,))] if system_prompt else []
    for number, message in enumerate(msgs):
        role, content = _checked(message, number)
        if role == "system" and turns:
            raise MessageError(
                f"msgs[{number}]: found a system message, expected it first and only once. Remove it."
            )
        if image is not None and role == "user":
            content, image = _with_image(content, image, number), None
        turns.append(Turn(role, tuple(_parts(content, pictures, number, joined_by))))
    _check_order(turns)
    return turns, pictures


def place_pictures(question: str, pictures: Sequence[Image.Image | Picture]) -> list[Any]:
    """A message's content: the pictures where the question says ``<ImageHere>``, or all in front of it.

    Raises:
        MessageError: When there are marks, but not one for each picture.

    Example:
        >>> place_pictures("What is it?", [])
        ['What is it?']
    """
    texts = question.split(IMAGE_MARK)
    if len(texts) == 1:
        return [*pictures, question]
    if len(texts) != len(pictures) + 1:
        raise MessageError(
            f"the question has {len(texts) - 1} {IMAGE_MARK} for {len(pictures)} pictures, expected one for each. "
            "Show as many pictures, or leave the marks out: then all stand in front of the question."
        )
    content: list[Any] = [texts[0]]
    for picture, text in zip(pictures, texts[1:], strict=True):
        content += [picture, text]
    return [part for part in content if part != ""]


def as_one_video(
    turns: Sequence[Turn], pictures: Sequence[Image.Image | Picture], times: Sequence[Sequence[int]]
) -> tuple[list[Turn], list[Picture]]:
    """Take the images of a conversation as the frames of one video, as V-4.5's ``temporal_ids`` means them.

    Args:
        turns: The conversation.
        pictures: Its images.
        times: The time index of every frame, in tenths of a second, pack by pack.

    Returns:
        The conversation with the video where its first frame stood, and the video.

    Raises:
        MessageError: When there are more or fewer frames than times.
    """
    frames = [picture for picture in pictures if isinstance(picture, Image.Image)]
    count = sum(len(pack) for pack in times)
    if count != len(frames) or len(frames) != len(pictures):
        raise MessageError(
            f"temporal_ids: {count} time indices for {len(frames)} images, expected one for each. Group the "
            "time indices of all frames, in their order, and give no other images."
        )
    video = Picture(
        "video", tuple(frame.size for frame in frames), lambda: frames, tuple(tuple(pack) for pack in times)
    )
    changed, seen = [], False
    for turn in turns:
        parts: list[Part] = []
        for part in turn.parts:
            if isinstance(part, Media):
                parts += [] if seen else [Media("video", 0)]
                seen = True
            elif part != "\n" or not (parts and isinstance(parts[-1], Media)):
                parts.append(part)
        changed.append(Turn(turn.role, tuple(parts)))
    return changed, [video]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise MessageError(f"msgs: a text that is no JSON ({error}). Give a list of messages.") from error


def _checked(message: Any, number: int) -> tuple[str, Any]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise MessageError(
            f"msgs[{number}]: found {message!r:.80}, expected {{'role': ..., 'content': ...}}. Write it so."
        )
    if message["role"] not in ROLES:
        raise MessageError(
            f"msgs[{number}]: found role {message['role']!r}, expected one of {', '.join(ROLES)}. Rename "
            "the role."
        )
    return message["role"], message["content"]


def _with_image(content: Any, image: Image.Image, number: int) -> list[Any]:
    content = list(content) if isinstance(content, (list, tuple)) else [content]
    if any(isinstance(part, Image.Image) for part in content):
        raise MessageError(
            f"image is given and msgs[{number}] holds images too, expected one of the two: leave image out "
            "and put all images into the content list, in the order in which the model is to see them."
        )
    return [image, *content]


def _parts(content: Any, pictures: list[Image.Image | Picture], number: int, joined_by: str) -> list[Part]:
    parts: list[Part] = []
    for item in content if isinstance(content, (list, tuple)) else [content]:
        if parts and joined_by:
            parts.append(joined_by)
        if isinstance(item, str):
            parts.append(item)
        elif isinstance(item, (Image.Image, Picture)):
            parts.append(Media("image" if isinstance(item, Image.Image) else item.kind, len(pictures)))
            pictures.append(item.convert("RGB") if isinstance(item, Image.Image) else item)
        else:
            raise MessageError(
                f"msgs[{number}]: found a {type(item).__name__} in the content, expected texts and PIL "
                "images. Open files with PIL.Image.open first."
            )
    return _joined(parts)


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Join texts that touch."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def _check_order(turns: Sequence[Turn]) -> None:
    spoken = [turn for turn in turns if turn.role != "system"]
    for number, turn in enumerate(spoken):
        expected = "assistant" if number % 2 else "user"
        if turn.role != expected:
            raise MessageError(
                f"message {number} of the conversation has role {turn.role!r}, expected {expected!r}: user "
                "and assistant alternate, starting with the user. Join or remove the extra message."
            )
    if len(spoken) % 2 == 0:
        raise MessageError("the last message is the assistant's, expected the user's. Add the question.")

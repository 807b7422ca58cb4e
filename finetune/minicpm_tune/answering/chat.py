"""``chat`` in the calling form of the released models: messages and pictures in, an answer out.

A message is ``{"role", "content"}``. Its content is a text, or a list of PIL images and texts, which are joined by
newlines.

Source: ``chat`` in the released modeling_minicpmv.py of V-2 to V-4.5.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, groupby
from typing import Any

import numpy as np
from PIL import Image

from minicpm_tune.answering import generate
from minicpm_tune.answering.generate import GREEDY, RELEASED_BEAMS, RELEASED_SAMPLING
from minicpm_tune.batch import Sample
from minicpm_tune.data.media.audio import Clip
from minicpm_tune.data.media.images import Picture
from minicpm_tune.data.samples import Processing, load_processing
from minicpm_tune.data.turns import ROLES, Media, Part, Turn
from minicpm_tune.errors import MessageError

logger = logging.getLogger(__name__)

IMAGE_MARK = "<ImageHere>"  # how users of InternLM-XComposer2 say where a picture stands
_NOT_GIVEN: Any = object()
# A text whose tokens show whether a tokenizer still splits as the checkpoint's own does.
_PROBE = "It's 12 <image> cats.\n 你好"


def chat(
    model: Any,
    image: Image.Image | None = None,
    msgs: Any = None,
    tokenizer: Any = None,
    processor: Processing | None = None,
    *,
    max_new_tokens: int = 2048,
    min_new_tokens: int = 0,
    sampling: bool = True,
    max_inp_length: int | None = None,
    system_prompt: str = "",
    stream: bool = False,
    max_slice_nums: int | None = None,
    use_image_id: bool | None = None,
    enable_thinking: bool | None = None,
    temporal_ids: Sequence[Sequence[int]] | None = None,
    omni_input: bool = False,
    omni_mode: bool = False,
    context: Any = _NOT_GIVEN,
    **options: Any,
) -> Any:
    """Answer a conversation.

    Differs from the released code: a prompt that is too long is an error instead of being cut, and every option
    reaches ``generate``, not only those that have a default.

    Args:
        model: A model of any generation, with or without an adapter.
        image: Stands in front of the first question; None when the images are in ``msgs``.
        msgs: ``[{"role", "content"}, ...]`` (or its JSON); or a list of such conversations, answered as a batch.
        tokenizer: The checkpoint's tokenizer; None loads it from the checkpoint.
        processor: The checkpoint's ``Processing``; None loads it from the checkpoint.
        max_new_tokens: Longest answer, in tokens.
        min_new_tokens: Shortest answer, in tokens.
        sampling: True samples (temperature 0.7, top_p 0.8, top_k 100, repetition_penalty 1.05); False searches
            with 3 beams and repetition_penalty 1.2 (streaming: takes the most likely token).
        max_inp_length: Longest prompt, in tokens, image placeholders included; None for no limit.
        system_prompt: A system message to start with.
        stream: Whether the answer comes in pieces, as an iterator.
        max_slice_nums: Most slices an image is cut into; None takes the checkpoint's.
        use_image_id: Whether images are numbered; None does as the checkpoint was trained.
        enable_thinking: Whether the model thinks first (V-4.5 and later); None: as it does by itself.
        temporal_ids: V-4.5: the images are the frames of one video; their time indices, pack by pack.
        omni_input: MiniCPM-o 2.6: the parts of a message are joined by nothing; for frames and their sound in turn.
        omni_mode: The same, as 4.5 calls it.
        context: V-2's calling form passes it and gets its triple.
        **options: Generation options that replace those of ``sampling``.

    Returns:
        The answer; a list of answers for a batch; an iterator with ``stream``; or V-2's triple (answer, messages
        with the answer, options).

    Raises:
        MessageError: When ``msgs`` is not in the released form.
        RowError: When a text holds a token that the model would read as structure, or ``enable_thinking`` is set
            for a generation without a thinking mode.
    """
    defaults = RELEASED_SAMPLING if sampling else GREEDY if stream else RELEASED_BEAMS
    lengths = {"max_new_tokens": max_new_tokens} | (
        {"min_new_tokens": min_new_tokens} if min_new_tokens else {}
    )
    options = defaults | lengths | {name: value for name, value in options.items() if value is not None}
    processing = _with_tokenizer(processor or _own_processing(model), tokenizer)
    if max_slice_nums is not None:
        processing = processing.with_media(slicing=processing.rules.limited(max_slice_nums))
    if use_image_id is not None:
        processing = processing.with_media(style=replace(processing.style, image_ids=use_image_id))
    batched = isinstance(msgs, Sequence) and bool(msgs) and isinstance(msgs[0], (list, tuple))
    if batched and (image is not None or stream):
        raise MessageError(
            "msgs holds several conversations, but image or stream is given too. Put the images into msgs, and "
            "stream one conversation at a time."
        )
    samples = [
        _prompt(
            processing, one, times=temporal_ids, thinking=enable_thinking, omni=omni_input or omni_mode, image=image,
            system_prompt=system_prompt,
        )
        for one in (msgs if batched else [msgs])
    ]  # fmt: skip
    _check_length(samples, max_inp_length)
    if stream:
        return generate.stream(model, processing, samples[0], **options)
    answers = generate.answer(model, processing, samples, **options)
    if batched:
        return answers
    if context is not _NOT_GIVEN:
        return answers[0], [*msgs, {"role": "assistant", "content": answers[0]}], options
    return answers[0]


def _own_processing(model: Any) -> Processing:
    """The ``Processing`` of the model's checkpoint; kept on the model, since loading takes a second."""
    if model.processing is None:
        if not model.config.name_or_path:
            raise MessageError(
                "this model was not loaded from a checkpoint folder, so its tokenizer is unknown. Pass the "
                "checkpoint's Processing as processor."
            )
        model.processing = load_processing(model.config.name_or_path)
    return model.processing


def _prompt(
    processing: Processing, msgs: Any, *, times: Any, thinking: bool | None, omni: bool, **given: Any
) -> Sample:
    turns, pictures = read_messages(
        msgs,
        joined_by="" if omni else processing.generation.image_end,
        literal=processing.arguments.literal_control_tokens,
        **given,
    )
    if times is not None:
        turns, pictures = as_one_video(turns, pictures, times)
    return processing.encode_prompt(turns, pictures, thinking=thinking)


def _check_length(samples: Sequence[Sample], limit: int | None) -> None:
    longest = max(len(sample["input_ids"]) for sample in samples)
    if limit is not None and longest > limit:
        raise MessageError(
            f"the prompt has {longest} tokens, images included, expected at most max_inp_length = {limit}. Leave "
            "out turns or images, lower max_slice_nums, or raise max_inp_length."
        )


def _with_tokenizer(processing: Processing, tokenizer: Any) -> Processing:
    """Take a user's tokenizer, whose template may be changed, if it encodes as the checkpoint's own does."""
    own = processing.tokenizer
    if tokenizer is None or tokenizer is own:
        return processing
    ids = [each(_PROBE, add_special_tokens=False)["input_ids"] for each in (tokenizer, own)]
    if ids[0] != ids[1]:
        # Remote tokenizer classes lose their pre-tokenizer or normalizer on transformers 5.
        logger.warning(
            "The tokenizer given to chat encodes text differently from the checkpoint's tokenizer file, so the "
            "file is used. Leave tokenizer out, or load it with checkpoints.vocabulary.load_tokenizer."
        )
        return processing
    if tokenizer.chat_template == own.chat_template:
        return processing
    writer = type(processing.writer)(tokenizer, processing.generation, processing.writer.arguments)
    return replace(processing, tokenizer=tokenizer, writer=writer)


def read_messages(
    msgs: str | Sequence[Mapping[str, Any]],
    *,
    image: Image.Image | None = None,
    system_prompt: str = "",
    joined_by: str = "\n",
    literal: bool = False,
) -> tuple[list[Turn], list[Picture | Clip]]:
    """Read a conversation whose last message is the user's.

    Args:
        msgs: The messages, or their JSON.
        image: Stands in front of the first user message; None when the images are in the messages.
        system_prompt: Stands before all messages; empty for none.
        joined_by: What stands between the parts of a message; ``Generation.image_end``.
        literal: Whether control texts are plain text.

    Returns:
        The turns, and the pictures in the order of the text; images in mode RGB.

    Raises:
        MessageError: When a message is not in the released form.

    Example:
        >>> read_messages([{"role": "user", "content": "Who are you?"}])
        ([Turn(role='user', parts=('Who are you?',), weight=1.0)], [])
    """
    if isinstance(msgs, str):
        try:
            msgs = json.loads(msgs)
        except json.JSONDecodeError as error:
            raise MessageError(f"msgs: the text is not JSON ({error}). Pass a list of messages.") from error
    if not isinstance(msgs, Sequence) or not msgs:
        raise MessageError(
            f"msgs: found {msgs!r:.80}, expected a list with at least one message. Add the question."
        )
    pictures: list[Picture | Clip] = []
    turns = [Turn("system", (system_prompt,))] if system_prompt else []
    joined_by = "" if any(_has_film(message) for message in msgs) else joined_by
    for number, message in enumerate(msgs):
        role, content = _checked(message, number)
        if role == "system" and turns:
            raise MessageError(
                f"msgs[{number}]: found a system message, expected at most one, in front. Remove it."
            )
        if image is not None and role == "user":
            content, image = _with_image(content, image, number), None
        parts, shown = _parts(content, number, joined_by, first=len(pictures))
        turns.append(Turn(role, parts, literal=literal))
        pictures += shown
    _check_order(turns)
    return turns, pictures


def _has_film(message: Any) -> bool:
    """Whether a message has a video with its sound; the released omni form joins all parts by nothing."""
    content = message.get("content") if isinstance(message, Mapping) else None
    return isinstance(content, (list, tuple)) and any(
        isinstance(part, Picture) and bool(part.sound) for part in content
    )


def place_pictures(question: str, pictures: Sequence[Image.Image | Picture | Clip]) -> list[Any]:
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
            "Show as many pictures, or leave the marks out to put all of them in front of the question."
        )
    content = [texts[0], *chain.from_iterable(zip(pictures, texts[1:], strict=True))]
    return [part for part in content if part != ""]


def as_one_video(
    turns: Sequence[Turn], pictures: Sequence[Picture | Clip], times: Sequence[Sequence[int]]
) -> tuple[list[Turn], list[Picture | Clip]]:
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
    images = [picture for picture in pictures if isinstance(picture, Picture) and picture.kind == "image"]
    count = sum(len(pack) for pack in times)
    if count != len(images) or len(images) != len(pictures):
        raise MessageError(
            f"temporal_ids: found {count} time indices for {len(images)} images, expected one for each. List the "
            "time index of every frame, in order, and pass no other pictures."
        )
    video = Picture(
        "video",
        tuple(image.sizes[0] for image in images),
        lambda: (frame for image in images for frame in image.frames()),
        tuple(tuple(pack) for pack in times),
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
        changed.append(replace(turn, parts=tuple(parts)))
    return changed, [video]


def _checked(message: Any, number: int) -> tuple[str, Any]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise MessageError(
            f"msgs[{number}]: found {message!r:.80}, expected a dictionary with role and content. Add what is "
            "missing."
        )
    if message["role"] not in ROLES:
        raise MessageError(
            f"msgs[{number}]: found role {message['role']!r}, expected one of {', '.join(ROLES)}. Rename the role."
        )
    return message["role"], message["content"]


def _with_image(content: Any, image: Image.Image, number: int) -> list[Any]:
    content = list(content) if isinstance(content, (list, tuple)) else [content]
    if any(isinstance(part, Image.Image) for part in content):
        raise MessageError(
            f"image is given and msgs[{number}] holds images too, expected one of the two. Leave image out and put "
            "all images into the content list, in the order in which the model is to see them."
        )
    return [image, *content]


def _parts(
    content: Any, number: int, joined_by: str, *, first: int
) -> tuple[tuple[Part, ...], list[Picture | Clip]]:
    """The parts of a message, texts that touch joined, and its pictures, numbered from ``first``."""
    parts: list[str | Media] = []
    pictures: list[Picture | Clip] = []
    for item in content if isinstance(content, (list, tuple)) else [content]:
        if parts and joined_by:
            parts.append(joined_by)
        if isinstance(item, str):
            parts.append(item)
            continue
        if isinstance(item, Image.Image):
            item = Picture.of(item.convert("RGB"))
        elif isinstance(item, np.ndarray):  # audio at 16 kHz, as librosa.load gives it to the released chat
            item = Clip.of(item.astype(np.float32))
        elif not isinstance(item, (Picture, Clip)):
            raise MessageError(
                f"msgs[{number}]: found {type(item).__name__} in the content, expected texts, PIL images "
                "and arrays of audio at 16 kHz. Open pictures with PIL.Image.open first."
            )
        sounds = isinstance(item, Picture) and bool(item.sound)
        parts.append(Media(item.kind, first + len(pictures), sounds))
        pictures.append(item)
    runs = groupby(parts, key=lambda part: part if isinstance(part, Media) else str)
    return tuple(key if isinstance(key, Media) else "".join(map(str, run)) for key, run in runs), pictures


def _check_order(turns: Sequence[Turn]) -> None:
    spoken = [turn for turn in turns if turn.role != "system"]
    for number, turn in enumerate(spoken):
        expected = "assistant" if number % 2 else "user"
        if turn.role != expected:
            raise MessageError(
                f"message {number} of the conversation has role {turn.role!r}, expected {expected!r}: user and "
                "assistant alternate, starting with the user. Join or remove the extra message."
            )
    if len(spoken) % 2 == 0:
        raise MessageError("the last message is the assistant's, expected the user's. Add the question.")

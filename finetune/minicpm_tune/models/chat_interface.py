"""The two ways in which users of a model ask it: ``chat`` in the released calling form, and ``generate``.

Mixed into the model classes. The data side is imported when it is first needed, so that the model
itself does not depend on it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

    from minicpm_tune.batch import Sample
    from minicpm_tune.data.samples import Processing

logger = logging.getLogger(__name__)

_NOT_GIVEN: Any = object()
# A text whose tokens tell whether a tokenizer still splits as the checkpoint's own.
_PROBE = "It's 12 <image> cats.\n 你好"


class GenerateMixin:
    """``generate`` for V-2 to V-4.5: image embeddings go into the LLM's own ``generate``."""

    # What the model class brings.
    llm: Any
    embed: Any
    embedding_scale: float
    get_input_embeddings: Any

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        tgt_sizes: Any = None,
        image_bound: Any = None,
        temporal_ids: Any = None,
        dummy: bool = False,
        **options: Any,
    ) -> Any:
        """Generate from prompts with images.

        Args:
            input_ids: [B, T] int64, several prompts padded on the LEFT.
            attention_mask: [B, T], 1 at real tokens; needed when padded.
            pixel_values: As for ``embed``, as the three that follow.
            tgt_sizes: See ``embed``.
            image_bound: See ``embed``.
            temporal_ids: See ``embed``.
            dummy: Run the vision tower even without an image, so that no process waits for another.
            **options: For ``transformers.GenerationMixin.generate``.

        Returns:
            [B, new tokens] int64 without the prompt, or what ``return_dict_in_generate`` asks for.
        """
        embeddings = self.embed(
            input_ids, pixel_values=pixel_values, tgt_sizes=tgt_sizes, image_bound=image_bound,
            temporal_ids=temporal_ids, dummy=dummy,
        )  # fmt: skip
        with self._new_tokens_scaled():
            return self.llm.generate(inputs_embeds=embeddings, attention_mask=attention_mask, **options)

    @contextmanager
    def _new_tokens_scaled(self) -> Iterator[None]:
        """V-2: scale the embeddings of generated tokens too; the prompt's are scaled in ``embed``."""
        if self.embedding_scale == 1:
            yield
            return
        scale = self.embedding_scale
        hook = self.get_input_embeddings().register_forward_hook(lambda *call: call[-1] * scale)
        try:
            yield
        finally:
            hook.remove()

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The LLM's own; adapters look for it on the whole model."""
        return self.llm.prepare_inputs_for_generation(*args, **kwargs)


class ChatMixin:
    """``chat`` in the calling form of the released models."""

    config: Any  # the model class brings it
    _processing: Any = None  # the checkpoint's ``Processing``, once asked for

    def chat(
        self,
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
        enable_thinking: bool = False,
        temporal_ids: Sequence[Sequence[int]] | None = None,
        context: Any = _NOT_GIVEN,
        **options: Any,
    ) -> Any:
        """Answer a conversation.

        Differs from the released code: a prompt that is too long is an error, not cut, and every
        option is handed to ``generate``, not only those it has a default for.

        Args:
            image: Stands in front of the first question; None when images are in ``msgs``.
            msgs: ``[{"role", "content"}, ...]`` (or its JSON), the content a text or a list of PIL images
                and texts; or a list of such conversations, answered as a batch.
            tokenizer: The checkpoint's tokenizer; by default it is loaded from the checkpoint.
            processor: The checkpoint's ``Processing``; by default it is loaded from the checkpoint.
            max_new_tokens: Longest answer, in tokens.
            min_new_tokens: Shortest answer, in tokens.
            sampling: True: sample (temperature 0.7, top_p 0.8, top_k 100, repetition_penalty 1.05);
                False: 3 beams with repetition_penalty 1.2 (greedy while streaming).
            max_inp_length: Longest prompt, in tokens, image placeholders included; None for no limit.
            system_prompt: A system message to start with.
            stream: True gives the answer in pieces, as an iterator.
            max_slice_nums: Most slices an image is cut into; by default the checkpoint's.
            use_image_id: Whether images are numbered; by default as the checkpoint was trained.
            enable_thinking: Whether the model thinks first (V-4.5 and later).
            temporal_ids: V-4.5: the images are the frames of one video; their time indices, pack by pack.
            context: V-2's calling form passes it; the answer then is its triple.
            **options: Generation options that replace those of ``sampling``.

        Returns:
            The answer; a list of answers for a batch; an iterator with ``stream``; or V-2's triple
            (answer, messages with the answer, options).

        Raises:
            MessageError: When ``msgs`` is not in the released form.
            RowError: When a text holds a token that the model would read as structure, or thoughts are asked
                of a generation without.
        """
        from minicpm_tune.answering.chat_messages import MessageError
        from minicpm_tune.answering.generate import GREEDY, RELEASED_BEAMS, RELEASED_SAMPLING
        from minicpm_tune.answering.generate import answer as answer_prompts
        from minicpm_tune.answering.generate import stream as stream_answer

        defaults = RELEASED_SAMPLING if sampling else GREEDY if stream else RELEASED_BEAMS
        given = {name: value for name, value in options.items() if value is not None}
        options = {**defaults, "max_new_tokens": max_new_tokens, **given}
        if min_new_tokens:
            options["min_new_tokens"] = min_new_tokens
        processing = _with_options(
            _with_tokenizer(processor or self._own_processing(), tokenizer), max_slice_nums, use_image_id
        )
        batched = isinstance(msgs, Sequence) and bool(msgs) and isinstance(msgs[0], (list, tuple))
        if batched and (image is not None or stream):
            raise MessageError("several conversations at once: put images into msgs, and leave stream out.")
        samples = [
            _prompt(
                processing, one, times=temporal_ids, thinking=enable_thinking, image=image,
                system_prompt=system_prompt,
            )
            for one in (msgs if batched else [msgs])
        ]  # fmt: skip
        _check_length(samples, max_inp_length)
        if stream:
            return stream_answer(self, processing, samples[0], **options)
        answers = answer_prompts(self, processing, samples, **options)
        if context is not _NOT_GIVEN and not batched:
            return answers[0], [*msgs, {"role": "assistant", "content": answers[0]}], options
        return answers if batched else answers[0]

    def _own_processing(self) -> Processing:
        from minicpm_tune.answering.chat_messages import MessageError
        from minicpm_tune.data.samples import load_processing

        if self._processing is None:
            if not self.config.name_or_path:
                raise MessageError("the model is of no checkpoint folder: pass its Processing as processor.")
            self._processing = load_processing(self.config.name_or_path)
        return self._processing


def _prompt(processing: Processing, msgs: Any, *, times: Any, thinking: bool, **given: Any) -> Sample:
    from minicpm_tune.answering.chat_messages import as_one_video, read_messages

    turns, pictures = read_messages(msgs, joined_by=processing.generation.image_end, **given)
    if times is None:
        return processing.encode_prompt(turns, pictures, thinking=thinking)
    turns, video = as_one_video(turns, pictures, times)
    return processing.encode_prompt(turns, video, thinking=thinking)


def _check_length(samples: Sequence[Sample], limit: int | None) -> None:
    from minicpm_tune.answering.chat_messages import MessageError

    longest = max(len(sample["input_ids"]) for sample in samples)
    if limit is not None and longest > limit:
        raise MessageError(
            f"the prompt has {longest} tokens, images included, expected at most max_inp_length = {limit}. "
            "Leave out turns or images, lower max_slice_nums, or raise max_inp_length."
        )


def _with_tokenizer(processing: Processing, tokenizer: Any) -> Processing:
    """Take a user's tokenizer, whose template may be changed, if it encodes as the checkpoint's own does."""
    own = processing.tokenizer
    if tokenizer is None or tokenizer is own:
        return processing
    ids = [each(_PROBE, add_special_tokens=False)["input_ids"] for each in (tokenizer, own)]
    if ids[0] != ids[1]:
        # Remote tokenizer classes lose their pre-tokenizer or normaliser on transformers 5.
        logger.warning(
            "The tokenizer given to chat encodes otherwise than the checkpoint's tokenizer file, which is "
            "used instead. Leave tokenizer out, or load it with checkpoint.load_tokenizer."
        )
        return processing
    if tokenizer.chat_template == own.chat_template:
        return processing
    writer = type(processing.writer)(tokenizer, processing.generation, processing.writer.options)
    return replace(processing, tokenizer=tokenizer, writer=writer)


def _with_options(
    processing: Processing, max_slice_nums: int | None, use_image_id: bool | None
) -> Processing:
    if max_slice_nums is not None:
        processing = replace(processing, rules=processing.rules.limited(max_slice_nums))
    if use_image_id is not None:
        processing = replace(processing, style=replace(processing.style, image_ids=use_image_id))
    return processing

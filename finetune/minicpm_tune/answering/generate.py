"""How a model answers: prompts -> a batch padded on the left -> new tokens -> texts.

Generation itself, with its key/value cache, is transformers' ``generate``.
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from minicpm_tune.batch import Sample
from minicpm_tune.data.sample_tensors import data_collator
from minicpm_tune.data.samples import Processing

# What ends a text besides the generation's own turn end; the terminators of the released code.
_TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>")
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
# The two ways in which the released chat answers; its default is ``sampling=True``.
RELEASED_SAMPLING = {
    "do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 100, "repetition_penalty": 1.05,
}  # fmt: skip
RELEASED_BEAMS = {"do_sample": False, "num_beams": 3, "repetition_penalty": 1.2}
INCOMPLETE = "\ufffd"  # what a tokenizer decodes the first bytes of a character to


def generation_options(values: Namespace) -> dict[str, Any]:
    """The flags of ``command_flags.read_answering_flags`` as transformers' generation options.

    What is unset takes the released chat's values.
    """
    options = RELEASED_SAMPLING if values.sampling else GREEDY
    names = ("temperature", "top_p", "top_k", "repetition_penalty", "num_beams")
    given = {name: getattr(values, name) for name in names if getattr(values, name) is not None}
    return {**options, **given, "max_new_tokens": values.max_new_tokens}


def stop_ids(processing: Processing) -> list[int]:
    """The tokens that end an answer: the generation's turn end, and the ends of a text in its vocabulary.

    Example:
        A MiniCPM-V 2.6 checkpoint gives the ids of ``<|im_end|>`` and ``<|endoftext|>``.
    """
    tokenizer = processing.tokenizer
    vocabulary = tokenizer.get_vocab()
    # Stands before the turn end in a spoken answer.
    spoken = ("<|tts_eos|>",) if processing.generation.hearing else ()
    texts = (processing.generation.turn_end, tokenizer.eos_token, *_TEXT_ENDS, *spoken)
    return sorted({vocabulary[text] for text in texts if text in vocabulary})


def answer(
    model: Any,
    processing: Processing,
    samples: Sequence[Sample],
    *,
    streamer: BaseStreamer | None = None,
    synced: bool = False,
    **options: Any,
) -> list[str]:
    """Let the model answer prompts.

    Args:
        model: A model of any generation, with or without an adapter.
        processing: The checkpoint's ``Processing``.
        samples: The prompts, from ``Processing.encode_prompt``.
        streamer: Gets the tokens as they come; needs a single prompt and no beams.
        synced: Whether other processes hold parts of the weights (ZeRO-3, FSDP): all must run equally many steps.
        **options: transformers' generation options: ``max_new_tokens``, ``do_sample``, ``top_p``, ...

    Returns:
        The answers, without the token that ended them.
    """
    tokenizer = processing.tokenizer
    pad = tokenizer.pad_token_id
    stops = stop_ids(processing)
    made = data_collator(samples, pad_token_id=stops[0] if pad is None else pad, padding_side="left")
    batch = {
        name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in made.items()
    }
    if synced:
        options["synced_gpus"] = batch["dummy"] = True
    with torch.no_grad(), warnings.catch_warnings():
        # The penalty covers the answer alone, as in the released chat.
        warnings.filterwarnings("ignore", message="Passing `repetition_penalty` with `inputs_embeds`")
        ends = {"eos_token_id": stops, "pad_token_id": stops[0]}
        found = model.generate(**batch, **ends, streamer=streamer, **options)
    return [decode(row, tokenizer, stops) for row in found.tolist()]


def decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerFast, stops: Sequence[int]) -> str:
    """The text of new tokens up to the first stop token; marks such as ``<box>`` stay in it."""
    end = next((index for index, token in enumerate(ids) if token in stops), len(ids))
    return _text(tokenizer, ids[:end]).strip()


def _text(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


class TextPieces(BaseStreamer):
    """Turns the tokens of one answer into pieces of text that never change later.

    Joined, the pieces are the answer, without white space at its ends. A character comes when all its bytes are
    there.

    Args:
        tokenizer: The checkpoint's tokenizer.
        stops: Tokens that end the answer.
        give: Called with every piece.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stops: Sequence[int], give: Callable[[str], None]):
        self.tokenizer, self.stops, self.give = tokenizer, set(stops), give
        self.ids: list[int] = []
        self._prompt_seen = self._ended = False
        self._start = self._shown = 0  # tokens before _shown are given, those from _start on as their context
        self._held = ""
        self._any = False

    def put(self, value: Tensor) -> None:
        """Take the prompt (the first call) or the next token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.flatten().tolist():
            self._ended = self._ended or token in self.stops
            if not self._ended:
                self.ids.append(token)
        self._decode(last=False)

    def end(self) -> None:
        """Give what is left of the answer."""
        self._decode(last=True)

    def _decode(self, *, last: bool) -> None:
        before = _text(self.tokenizer, self.ids[self._start : self._shown])
        text = _text(self.tokenizer, self.ids[self._start :])
        if text.endswith(INCOMPLETE) and not last:
            return
        self._start, self._shown = self._shown, len(self.ids)
        self._give(text[len(before) :])

    def _give(self, text: str) -> None:
        text = self._held + text
        text = text if self._any else text.lstrip()
        given = text.rstrip()
        self._held = text[len(given) :]
        if given:
            self._any = True
            self.give(given)


def stream(model: Any, processing: Processing, sample: Sample, **options: Any) -> Iterator[str]:
    """Give an answer piece by piece, while another thread generates it.

    Args:
        model: As for ``answer``.
        processing: As for ``answer``.
        sample: The prompt.
        **options: As for ``answer``.

    Yields:
        The pieces; joined they are the answer.
    """
    pieces: SimpleQueue[str | None] = SimpleQueue()
    streamer = TextPieces(processing.tokenizer, stop_ids(processing), pieces.put)
    left = Event()

    def reader_left(ids: Tensor, *_: Any) -> Tensor:
        return torch.full((ids.shape[0],), left.is_set(), device=ids.device)

    with ThreadPoolExecutor(max_workers=1) as threads:
        result = threads.submit(
            answer, model, processing, [sample], streamer=streamer,
            stopping_criteria=StoppingCriteriaList([reader_left]), **options,
        )  # fmt: skip
        result.add_done_callback(lambda _: pieces.put(None))
        try:
            while (piece := pieces.get()) is not None:
                yield piece
        finally:
            left.set()  # a reader who stops reading stops the generation
        result.result()

"""Turns -> the pieces of the prompt, as the models see them at inference.

One rule for every generation: the text in front of the last answer is the text that inference gives
(the checkpoint's own chat template with its generation prompt), then the answer, then the token that ends a
turn. Earlier turns stand as the template renders history. MiniCPM-V 2.0 has no template; its format is
``<用户>{question}<AI>{answer}<用户>...`` with ``</s>`` after the last answer. The tokenizer of InternLM-XComposer2
has no template either; its form is ChatML and stands in ``checkpoints/model_generations.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from minicpm_tune.checkpoints.model_folder import ModelFolderError
from minicpm_tune.checkpoints.model_generations import Generation, Hearing
from minicpm_tune.data.objects import Tag
from minicpm_tune.data.turns import Literal, Media, Part, Turn, media_of
from minicpm_tune.errors import RowError
from minicpm_tune.settings.data_arguments import DataArguments

_THOUGHTS = re.compile(r"\A\s*<think>(.*?)</think>\s*", re.DOTALL)
_THINK_TAG = re.compile(r"</?think>")
_THINK_FORM = ("<think>\n", "\n</think>\n\n")  # what Qwen3's template writes around thoughts
_EMPTY_THOUGHTS = re.compile(r"<think>\s*</think>\s*\Z")
_OPEN_THOUGHTS = re.compile(r"<think>\s*\Z")
_PROBE = "\ue000probe\ue001"
# Stands where a picture or a literal text will, while the template is rendered; no text holds it.
_STAND_IN = "\ue000part\ue001"
# What a template writes after the token that ends a turn.
_AFTER_TURN_END = {"<|im_end|>": "\n", "<|eot_id|>": "", "</s>": "", "[UNUSED_TOKEN_145]": "\n</s>"}
# Texts that would be read as structure if they stood in a message.
_CONTROL_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|begin_of_text|>", "<|end_of_text|>", "<s>", "</s>", "<unk>", "<image>", "</image>", "<slice>",
    "</slice>", "<image_id>", "</image_id>", "<|image_pad|>", "<|video_pad|>", "[UNUSED_TOKEN_145]",
    "[UNUSED_TOKEN_146]", "<|audio_start|>", "<|audio_end|>", "<|audio|>", "<|spk_bos|>", "<|spk|>", "<|spk_eos|>",
    "<|tts_bos|>", "<|tts_eos|>",
)  # fmt: skip
_MINICPM_MARKS = ("<用户>", "<AI>")


@dataclass(frozen=True)
class Piece:
    """A stretch of the prompt.

    Attributes:
        text: The text; empty for media, whose placeholder is put in later.
        weight: How much its tokens count in the loss; 0: they are not supervised.
        literal: Whether control texts in it are plain text.
        media: The image or video that stands here.
        answer_start: Whether an answer that inference would generate starts here.
    """

    text: str = ""
    weight: float = 0.0
    literal: bool = False
    media: Media | None = None
    answer_start: bool = False


class PromptWriter:
    """Turns conversations of one checkpoint into pieces.

    Args:
        tokenizer: The checkpoint's tokenizer, with its chat template.
        generation: The checkpoint's generation.
        arguments: ``enable_thinking``, ``train_on`` and ``audio_prompt``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        generation: Generation,
        arguments: DataArguments | None = None,
    ) -> None:
        self.tokenizer, self.generation = tokenizer, generation
        self.arguments = arguments or DataArguments()
        vocabulary = tokenizer.get_vocab()
        control = [token for token in _CONTROL_TOKENS if token in vocabulary]
        control += _MINICPM_MARKS if generation.prompt == "minicpm" else ()
        added = [token for token in tokenizer.get_added_vocab() if token[0] in "<[" and token[-1] in ">]"]
        self._control, self._tokens = any_of(control), any_of([*control, *added])
        self._trims, self._think_form = False, _THINK_FORM
        if generation.prompt == "template":
            if not tokenizer.chat_template:
                raise ModelFolderError(
                    f"{generation.title}: the checkpoint's tokenizer has no chat template, expected one in "
                    "tokenizer_config.json. Download the tokenizer files again."
                )
            self._answer_header, self._trims = self._probe_template()
            if generation.thinking:
                self._think_form = self._probe_thoughts()

    def find_control_token(self, text: str) -> str | None:
        """The first token in a message's text that the model would read as structure, if there is one."""
        found = self._control.search(text)
        return found.group() if found else None

    def training_pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        """Write a conversation whose last turn is the answer to learn.

        Args:
            turns: The conversation; alternating, the last one of the assistant.

        Returns:
            The pieces; those with a ``weight`` are each answer and the token that ends it.

        Raises:
            RowError: When thoughts stand where the template has none.
        """
        *history, answer = turns
        assert answer.role == "assistant", answer.role
        thoughts, parts = self._split_thoughts(answer, len(history))
        if self.arguments.enable_thinking == "false":
            thoughts = []
        pieces = self._history(history, thinking=bool(thoughts) or self._asks_for_thoughts)
        thoughts = _fit_think_block(pieces, thoughts, closing=self._think_form[1])
        parts = [*thoughts, *parts]
        if self._trims:
            parts = _trimmed(parts)
        end = self.generation.turn_end
        return [
            *pieces,
            *self._speech_header(history),
            *_answer_pieces(parts, answer.weight),
            Piece(end, answer.weight),
            Piece(_AFTER_TURN_END[end]),
        ]

    def generation_pieces(self, turns: Sequence[Turn], *, thinking: bool | None = None) -> list[Piece]:
        """Write the prompt that inference gives for the next answer.

        Args:
            turns: The conversation so far; its last turn is the user's.
            thinking: Whether the model is asked to think first; None: as ``enable_thinking`` says, and with ``auto``
                as the model does by itself.

        Returns:
            The pieces; which of them a training run would supervise is of no matter here.
        """
        asked = self._asks_for_thoughts if thinking is None else thinking
        return [*self._history(turns, thinking=asked), *self._speech_header(turns)]

    @property
    def _asks_for_thoughts(self) -> bool:
        wish = self.arguments.enable_thinking
        return self.generation.thinks if wish == "auto" else wish == "true"

    # --- parts of a turn ---

    def _parts(self, turn: Turn) -> list[Part]:
        """A turn's parts; in a literal one, control texts are parts of their own."""
        if not turn.literal:
            return list(turn.parts)
        split = (self._literals(part) if isinstance(part, str) else [part] for part in turn.parts)
        return [part for parts in split for part in parts]

    def _literals(self, text: str) -> list[Part]:
        split = enumerate(self._tokens.split(text))  # text, token, text, ...
        return [Literal(each) if place % 2 else each for place, each in split if each]

    def _split_thoughts(self, turn: Turn, number: int) -> tuple[list[Part], list[Part]]:
        """An answer's thoughts, in the template's form, and the answer; their tags may stand nowhere else."""
        parts = self._parts(turn)
        if not self.generation.thinking:
            return [], parts
        before, after = self._think_form
        texts = [part for part in parts if isinstance(part, str)]
        tags = [tag for text in texts for tag in _THINK_TAG.findall(text)]
        if turn.thoughts is not None:
            thoughts = turn.thoughts.strip("\n")
            if not tags:
                inner = self._literals(thoughts) if turn.literal else [thoughts]
                return [before, *inner, after], _without_newlines(parts)
        elif not tags:
            return [], parts
        elif isinstance(parts[0], str) and tags == ["<think>", "</think>"]:
            if found := _THOUGHTS.match(parts[0]):
                return [found.group()], [part for part in (parts[0][found.end() :], *parts[1:]) if part]
        elif isinstance(parts[0], str) and tags == ["</think>"] and "</think>" in parts[0]:
            thoughts, _, answer = parts[0].partition("</think>")
            return [before + thoughts.strip("\n") + after], _without_newlines([answer, *parts[1:]])
        raise RowError(
            "thoughts",
            f"turn {number} has {' and '.join(tags)}, expected thoughts once, in front of the answer: "
            "<think>...</think>, or a key 'reasoning_content'. Rewrite the answer; a tag that is meant as text needs a "
            "backslash in front of it.",
        )

    # --- MiniCPM-V 2.0 ---

    def _minicpm_history(self, turns: Sequence[Turn]) -> list[Piece]:
        user, assistant = _MINICPM_MARKS
        pieces: list[Piece] = []
        for turn in _system_into_user(turns):
            if turn.role == "user":
                pieces += [Piece(user), *map(_piece, self._parts(turn)), Piece(assistant)]
            else:
                pieces += _answer_pieces(self._parts(turn), self._history_weight(turn))
        return pieces

    # --- chat templates ---

    def _history(self, turns: Sequence[Turn], *, thinking: bool) -> list[Piece]:
        """Render the turns with the generation prompt, and find each answer in the rendering.

        Every turn ends in the turn-end token and no message contains it, so the rendering splits into
        turns there; an assistant's turn then starts with the header that ``_probe_template`` saw.
        """
        if self.generation.prompt == "minicpm":
            return self._minicpm_history(turns)
        end = self.generation.turn_end
        parts = [self._history_parts(turn, number) for number, turn in enumerate(turns)]
        messages = [self._message(turn.role, each) for turn, each in zip(turns, parts, strict=True)]
        rendered = self._render(messages, thinking=thinking, spoken=self._spoken(turns))
        *bodies, tail = rendered.split(end)
        added = len(bodies) - len(turns)  # a default system turn
        if added not in (0, 1):
            raise ModelFolderError(
                f"chat template: rendered {len(bodies)} turns for {len(turns)} messages, expected as many (or one "
                "more, for a default system turn). The checkpoint's chat template can't be trained with."
            )
        order = iter([part for each in parts for part in each if not isinstance(part, str)])
        pieces: list[Piece] = []
        for turn, body in zip([*[None] * added, *turns], bodies, strict=True):
            if turn is None or turn.role != "assistant":
                pieces += [*self._split_parts(body, order), Piece(end)]
                continue
            header = self._answer_header
            if not body.startswith(header):
                raise ModelFolderError(
                    f"chat template: an earlier answer is rendered as {body[:60]!r}, expected it to start with "
                    f"{header!r}. The checkpoint's chat template can't be trained with."
                )
            weight = self._history_weight(turn)
            answer = self._split_parts(body.removeprefix(header), order)
            pieces += [Piece(header), *_weighted(answer, weight), Piece(end, weight)]
        return [*pieces, Piece(tail)]

    def _spoken(self, turns: Sequence[Turn]) -> Hearing | None:
        """The form in which the released chat() speaks, to which audio switches the whole conversation."""
        plain = self.arguments.audio_prompt == "plain" or not any(media.heard for media in media_of(turns))
        return None if plain else self.generation.hearing

    def _speech_header(self, turns: Sequence[Turn]) -> list[Piece]:
        spoken = self._spoken(turns)
        return [Piece(spoken.prompt_end)] if spoken else []

    def _history_parts(self, turn: Turn, number: int) -> list[Part]:
        """The parts of an earlier turn, with its thoughts as text: the template keeps them or leaves them out."""
        if turn.role != "assistant":
            return self._parts(turn)
        thoughts, parts = self._split_thoughts(turn, number)
        if not all(isinstance(part, str) for part in thoughts):
            raise RowError(
                "control token",
                f"turn {number}: thoughts of an earlier answer contain a control text, expected plain text. Remove it.",
            )
        return [*thoughts, *parts]

    def _history_weight(self, turn: Turn) -> float:
        return turn.weight if self.arguments.train_on == "all_turns" else 0.0

    def _split_parts(self, text: str, order: Iterator[Part]) -> list[Piece]:
        """Cut a rendered text where a medium or a literal text stands; ``order`` gives them."""
        marks = rf"{_STAND_IN}|<\|(?:image|video)_pad\|>" if self.generation.content_parts else _STAND_IN
        texts = re.split(marks, text)
        pieces = [Piece(texts[0])]
        for each in texts[1:]:
            pieces += [_piece(next(order)), Piece(each)]
        return [piece for piece in pieces if piece.text or piece.media]

    def _message(self, role: str, parts: Sequence[Part]) -> dict[str, Any]:
        texts = [part if isinstance(part, str) else _STAND_IN for part in parts]
        listed = role == "user" or any(isinstance(part, Media) for part in parts)
        if not listed or not self.generation.content_parts:
            return {"role": role, "content": "".join(texts)}
        content: list[dict[str, str]] = []
        for part, text in zip(parts, texts, strict=True):
            if isinstance(part, Media):
                content.append({"type": part.kind})
            elif content and content[-1]["type"] == "text":
                content[-1]["text"] += text
            else:
                content.append({"type": "text", "text": text})
        return {"role": role, "content": content}

    def _render(
        self, messages: list[dict[str, Any]], *, thinking: bool, spoken: Hearing | None = None
    ) -> str:
        options: dict[str, Any] = {"enable_thinking": thinking} if self.generation.thinking else {}
        template = spoken.chat_template if spoken else None  # of its own, or the checkpoint's
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True, **options
            )
        except TemplateError as error:  # templates refuse what they don't know, such as some orders of roles
            raise RowError(
                "template",
                f"the checkpoint's chat template refuses the conversation ({error}). Rewrite or remove the row.",
            ) from error
        assert isinstance(rendered, str), type(rendered)
        return rendered

    def _probe_template(self) -> tuple[str, bool]:
        """See what stands in front of an earlier answer, and whether the template trims messages."""
        probe = [Turn("user", ("x",)), Turn("assistant", (f" {_PROBE} ",)), Turn("user", ("x",))]
        rendered = self._render([self._message(turn.role, turn.parts) for turn in probe], thinking=False)
        before, _, after = rendered.partition(_PROBE)
        header = before.split(self.generation.turn_end)[-1]
        trims = not after.startswith(" ")
        return header.removesuffix("" if trims else " "), trims

    def _probe_thoughts(self) -> tuple[str, str]:
        """What the template writes in front of and behind thoughts given as ``reasoning_content``."""
        answer = {"role": "assistant", "content": "answer", "reasoning_content": _PROBE}
        rendered = self._render([self._message("user", ["x"]), answer], thinking=True)
        before, found, after = rendered.partition(_PROBE)
        opening, closing = before.rfind("<think>"), after.find("answer")
        if not found or opening < 0 or "</think>" not in after[: max(closing, 0)]:
            return _THINK_FORM  # a template that knows no such key
        return before[opening:], after[:closing]


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of some texts, the longest first; nothing when there are none."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(set(texts), key=len, reverse=True))) or '(?!)'})")


def _fit_think_block(before: list[Piece], thoughts: list[Part], *, closing: str) -> list[Part]:
    """What an answer starts with behind a prompt, whose end can change; templates write ``closing`` behind thoughts."""
    prompt = before[-1].text if before else ""
    if _OPEN_THOUGHTS.search(prompt):  # a template that writes the opening tag itself
        if not thoughts:
            return [closing]  # the answer learns to end the thoughts that the prompt has opened
        first = thoughts[0]
        assert isinstance(first, str), thoughts
        return [re.sub(r"\A\s*<think>\s*", "", first), *thoughts[1:]]
    if thoughts and _EMPTY_THOUGHTS.search(prompt):  # a template that cannot ask for thoughts
        before[-1] = Piece(_EMPTY_THOUGHTS.sub("", prompt))
    return thoughts


def _answer_pieces(parts: Sequence[Part], weight: float) -> list[Piece]:
    pieces = _weighted(map(_piece, parts), weight)
    if pieces and pieces[0].text:
        pieces[0] = replace(pieces[0], answer_start=True)
    return pieces


def _weighted(pieces: Iterable[Piece], weight: float) -> list[Piece]:
    return [piece if piece.media else replace(piece, weight=weight) for piece in pieces]


def _piece(part: Part) -> Piece:
    if isinstance(part, Media):
        return Piece(media=part)
    assert isinstance(part, (str, Literal, Tag)), part
    return Piece(part) if isinstance(part, str) else Piece(part.text, literal=isinstance(part, Literal))


def _without_newlines(parts: list[Part]) -> list[Part]:
    """An answer without the newlines it starts with, as templates write it behind thoughts."""
    first, *rest = parts or [""]
    return [part for part in (first.lstrip("\n") if isinstance(first, str) else first, *rest) if part]


def _trimmed(parts: list[Part]) -> list[Part]:
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return parts


def _system_into_user(turns: Sequence[Turn]) -> list[Turn]:
    """Put a system turn in front of the first user text, behind the images that the turn starts with.

    V-2 has no system form; its inference always writes the image first.
    """
    if not turns or turns[0].role != "system":
        return list(turns)
    system, first, *rest = turns
    position = 0
    for index, part in enumerate(first.parts):
        if isinstance(part, Media):
            position = index + 1
        elif not isinstance(part, str) or part.strip():
            break
    leading, text = first.parts[:position], list(first.parts[position:])
    if leading and text and isinstance(text[0], str):
        text[0] = text[0].removeprefix("\n")
    joined = [*leading, "\n"] if leading else []
    return [replace(first, parts=(*joined, *system.parts, "\n", *text)), *rest]

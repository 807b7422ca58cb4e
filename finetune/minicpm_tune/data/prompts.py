"""Turns -> the pieces of the prompt, as the models see them at inference.

One rule for every generation: the text in front of the last answer is the text that inference gives
(the checkpoint's own chat template with its generation prompt), then the answer, then the token that ends a
turn. Earlier turns stand as the template renders history. MiniCPM-V 2.0 has no template; its format is
``<用户>{question}<AI>{answer}<用户>...`` with ``</s>`` after the last answer. The tokenizer of InternLM-XComposer2
has no template either; its form is ChatML and stands in ``checkpoints/model_generations.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from minicpm_tune.checkpoints.model_folder import ModelFolderError
from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.data.turns import Media, Part, Turn, media_of
from minicpm_tune.errors import RowError
from minicpm_tune.settings.data_arguments import DataArguments

THOUGHTS = re.compile(r"\A\s*<think>(.*?)</think>\s*", re.DOTALL)
_EMPTY_THOUGHTS = re.compile(r"<think>\s*</think>\s*\Z")
_OPEN_THOUGHTS = re.compile(r"<think>\s*\Z")
_PROBE = "\ue000probe\ue001"
# Stands where a picture will, while the template is rendered; no text holds it.
_STAND_IN = "\ue000picture\ue001"
# What a template writes after the token that ends a turn.
_AFTER_TURN_END = {"<|im_end|>": "\n", "<|eot_id|>": "", "</s>": "", "[UNUSED_TOKEN_145]": "\n</s>"}
# Texts that would be read as structure if they stood in a message.
_CONTROL_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|begin_of_text|>", "<|end_of_text|>", "<s>", "</s>", "<unk>", "<image>", "</image>", "<slice>",
    "</slice>", "<image_id>", "</image_id>", "<|image_pad|>", "<|video_pad|>", "[UNUSED_TOKEN_145]",
    "[UNUSED_TOKEN_146]",
)  # fmt: skip
_MINICPM_MARKS = ("<用户>", "<AI>")


@dataclass(frozen=True)
class Piece:
    """A stretch of the prompt.

    Attributes:
        text: The text; empty for media, whose placeholder is put in later.
        learn: Whether its tokens are supervised.
        media: The image or video that stands here.
        answer_start: Whether an answer that inference would generate starts here.
    """

    text: str = ""
    learn: bool = False
    media: Media | None = None
    answer_start: bool = False


class PromptWriter:
    """Turns conversations of one checkpoint into pieces.

    Args:
        tokenizer: The checkpoint's tokenizer, with its chat template.
        generation: The checkpoint's generation.
        arguments: ``enable_thinking`` and ``train_on``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        generation: Generation,
        arguments: DataArguments | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.generation = generation
        self.arguments = arguments or DataArguments()
        vocabulary = tokenizer.get_vocab()
        marks = _MINICPM_MARKS if generation.prompt == "minicpm" else ()
        self.control_tokens = [token for token in _CONTROL_TOKENS if token in vocabulary] + list(marks)
        self._control = re.compile("|".join(map(re.escape, self.control_tokens)))
        if generation.prompt == "template":
            if not tokenizer.chat_template:
                raise ModelFolderError(
                    f"{generation.title}: the checkpoint's tokenizer has no chat template, expected one in "
                    "tokenizer_config.json. Download the tokenizer files again."
                )
            self._answer_header, self._trims = self._probe_template()

    def find_control_token(self, text: str) -> str | None:
        """The first token in a message's text that the model would read as structure, if there is one."""
        found = self._control.search(text)
        return found.group() if found else None

    def training_pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        """Write a conversation whose last turn is the answer to learn.

        Args:
            turns: The conversation; alternating, the last one of the assistant.

        Returns:
            The pieces; those with ``learn`` are each answer and the token that ends it.
        """
        *history, answer = turns
        assert answer.role == "assistant", answer.role
        if self.generation.prompt == "minicpm":
            pieces = self._minicpm_history(history)
        else:
            pieces = self._template_history(history, thinking=self._thinks(answer))
        end = self.generation.turn_end
        parts = self._answer_parts(answer, pieces)
        pieces += _answer_pieces(parts, learn=answer.learn)
        pieces.append(Piece(end, learn=answer.learn))
        return [*pieces, Piece(_AFTER_TURN_END[end])]

    def generation_pieces(self, turns: Sequence[Turn], *, thinking: bool = False) -> list[Piece]:
        """Write the prompt that inference gives for the next answer.

        Args:
            turns: The conversation so far; its last turn is the user's.
            thinking: Whether the model is asked to think first.

        Returns:
            The pieces; which of them a training run would supervise is of no matter here.
        """
        if self.generation.prompt == "minicpm":
            return self._minicpm_history(turns)
        return self._template_history(turns, thinking=thinking)

    # --- the last answer ---

    def _thinks(self, answer: Turn) -> bool:
        if not self.generation.thinking:
            return False
        wish = self.arguments.enable_thinking
        return wish == "true" if wish != "auto" else THOUGHTS.match(answer.text) is not None

    def _answer_parts(self, answer: Turn, before: list[Piece]) -> list[Part]:
        """The answer as it is trained, and the prompt's think block made to fit it."""
        parts = list(answer.parts)
        if self.generation.prompt == "template" and self._trims:
            parts = _trimmed(parts)
        if not (self.generation.thinking and parts and isinstance(parts[0], str)):
            return parts
        if not THOUGHTS.match(parts[0]):
            return parts
        if self.arguments.enable_thinking == "false":
            return [THOUGHTS.sub("", parts[0]), *parts[1:]]
        prompt = before[-1].text
        if _EMPTY_THOUGHTS.search(prompt):  # a template that cannot ask for thoughts
            before[-1] = Piece(_EMPTY_THOUGHTS.sub("", prompt))
        elif _OPEN_THOUGHTS.search(prompt):  # a template that writes the opening tag itself
            return [re.sub(r"\A\s*<think>\s*", "", parts[0]), *parts[1:]]
        return parts

    # --- MiniCPM-V 2.0 ---

    def _minicpm_history(self, turns: Sequence[Turn]) -> list[Piece]:
        user, assistant = _MINICPM_MARKS
        pieces: list[Piece] = []
        for turn in system_into_user(turns):
            if turn.role == "user":
                pieces.append(Piece(user))
                pieces += [_piece(part) for part in turn.parts]
                pieces.append(Piece(assistant))
            else:
                pieces += _answer_pieces(turn.parts, learn=self._learns_history(turn))
        return pieces

    # --- chat templates ---

    def _template_history(self, turns: Sequence[Turn], *, thinking: bool) -> list[Piece]:
        """Render the turns with the generation prompt, and find each answer in the rendering.

        Every turn ends in the turn-end token and no message contains it, so the rendering splits into
        turns there; an assistant's turn then starts with the header that ``_probe_template`` saw.
        """
        end = self.generation.turn_end
        *bodies, tail = self._render([self._message(turn) for turn in turns], thinking=thinking).split(end)
        added = len(bodies) - len(turns)  # a default system turn
        if added not in (0, 1):
            raise ModelFolderError(
                f"chat template: rendered {len(bodies)} turns for {len(turns)} messages, expected as many (or one "
                "more, for a default system turn). The checkpoint's chat template can't be trained with."
            )
        order = iter(media_of(turns))
        pieces: list[Piece] = []
        for index, body in enumerate(bodies):
            turn = turns[index - added] if index >= added else None
            if turn is None or turn.role != "assistant":
                pieces += [*self._split_media(body, order), Piece(end)]
                continue
            header, text = self._split_header(body)
            learn = self._learns_history(turn)
            pieces.append(Piece(header))
            pieces += [
                piece if piece.media else Piece(piece.text, learn) for piece in self._split_media(text, order)
            ]
            pieces.append(Piece(end, learn))
        return [*pieces, Piece(tail)]

    def _learns_history(self, turn: Turn) -> bool:
        return turn.learn and self.arguments.train_on == "all_turns"

    def _split_header(self, body: str) -> tuple[str, str]:
        if not body.startswith(self._answer_header):
            raise ModelFolderError(
                f"chat template: an earlier answer is rendered as {body[:60]!r}, expected it to start with "
                f"{self._answer_header!r}. The checkpoint's chat template can't be trained with."
            )
        return self._answer_header, body[len(self._answer_header) :]

    def _split_media(self, text: str, order) -> list[Piece]:
        if self.generation.content_parts:
            parts = re.split(r"<\|(?:image|video)_pad\|>", text)
        else:
            parts = text.split(_STAND_IN)
        pieces = [Piece(parts[0])]
        for part in parts[1:]:
            pieces += [Piece(media=next(order)), Piece(part)]
        return [piece for piece in pieces if piece.text or piece.media]

    def _message(self, turn: Turn) -> dict[str, Any]:
        if self.generation.content_parts and (turn.role == "user" or len(turn.parts) > 1):
            return {"role": turn.role, "content": [_content_part(part) for part in turn.parts]}
        content = "".join(part if isinstance(part, str) else _STAND_IN for part in turn.parts)
        return {"role": turn.role, "content": content}

    def _render(self, messages: list[dict[str, Any]], *, thinking: bool) -> str:
        options: dict[str, Any] = {"enable_thinking": thinking} if self.generation.thinking else {}
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **options
            )
        except TemplateError as error:  # templates refuse what they don't know, such as some orders of roles
            raise RowError(
                "template",
                f"the checkpoint's chat template refuses the conversation ({error}). Rewrite "
                "or remove the row.",
            ) from error
        assert isinstance(rendered, str), type(rendered)
        return rendered

    def _probe_template(self) -> tuple[str, bool]:
        """See what stands in front of an earlier answer, and whether the template trims messages."""
        probe = [Turn("user", ("x",)), Turn("assistant", (f" {_PROBE} ",)), Turn("user", ("x",))]
        rendered = self._render([self._message(turn) for turn in probe], thinking=False)
        before, _, after = rendered.partition(_PROBE)
        header = before.split(self.generation.turn_end)[-1]
        trims = not after.startswith(" ")
        return header.removesuffix("" if trims else " "), trims


def _answer_pieces(parts: Sequence[Part], *, learn: bool) -> list[Piece]:
    pieces = [Piece(part, learn) if isinstance(part, str) else Piece(media=part) for part in parts]
    if pieces and pieces[0].text:
        pieces[0] = Piece(pieces[0].text, learn, answer_start=True)
    return pieces


def _piece(part: Part) -> Piece:
    return Piece(part) if isinstance(part, str) else Piece(media=part)


def _content_part(part: Part) -> dict[str, str]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": part.kind}


def _trimmed(parts: list[Part]) -> list[Part]:
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return parts


def system_into_user(turns: Sequence[Turn]) -> list[Turn]:
    """Put a system turn in front of the first user text, behind the images that the turn starts with.

    V-2 has no system form; its inference always writes the image first.
    """
    if not turns or turns[0].role != "system":
        return list(turns)
    system, first, *rest = turns
    parts = list(first.parts)
    position = 0
    for index, part in enumerate(parts):
        if isinstance(part, Media):
            position = index + 1
        elif part.strip():
            break
    leading = parts[:position]
    text: list[Part] = list(parts[position:])
    if leading and text and isinstance(text[0], str):
        text[0] = text[0].removeprefix("\n")
    joined = [*leading, "\n"] if leading else []
    return [Turn("user", (*joined, *system.parts, "\n", *text)), *rest]

"""Pieces of a prompt -> token ids and labels; control texts that a user wrote stay plain text.

The whole text is encoded once; labels and image bounds follow from character positions. Encoding
segment by segment would change the tokens at every seam. Shapes: T is the length in tokens, P the number of
slices that have a placeholder.

The tokens of the prompt's own structure and those of a literal text must be told apart in that one text. So the
structure's tokens are replaced by characters that no text holds and that stand for the same ids, and the
tokens' own names are switched off.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from minicpm_tune.batch import IGNORE_INDEX
from minicpm_tune.data.placeholders import Placeholder
from minicpm_tune.data.prompts import Piece, any_of


@dataclass
class Encoded:
    """A conversation as tokens.

    Attributes:
        input_ids: Token ids, ``[T]``.
        labels: The token's id where it is supervised, else -100; not shifted, ``[T]``.
        image_bound: [start, end) in tokens of every run of pad tokens that stands for slices, ``[P]``.
        audio_bound: The same for audio.
        media_spans: [start, end) in tokens of every medium's whole placeholder.
        weights: How much each token counts in the loss, ``[T]``; None: all supervised ones count alike.
    """

    input_ids: list[int]
    labels: list[int]
    image_bound: list[tuple[int, int]] = field(default_factory=list)
    audio_bound: list[tuple[int, int]] = field(default_factory=list)
    media_spans: list[tuple[int, int]] = field(default_factory=list)
    weights: list[float] | None = None

    @property
    def supervised(self) -> int:
        """Number of supervised tokens; the first token of a text can't be predicted and doesn't count."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])

    @property
    def audio_tokens(self) -> int:
        """Tokens of the placeholders of audio, the tags around each run included."""
        return sum(end - start + 2 for start, end in self.audio_bound)


def encode_pieces(
    pieces: Sequence[Piece], placeholders: Sequence[Placeholder], tokenizer: PreTrainedTokenizerFast
) -> Encoded:
    """Encode a prompt and say which of its tokens are supervised.

    Args:
        pieces: What ``PromptWriter`` wrote.
        placeholders: The placeholder of each medium, by ``Media.index``.
        tokenizer: The checkpoint's tokenizer.

    Returns:
        The tokens, labels and bounds.
    """
    encoder: Any = tokenizer
    if any(piece.literal for piece in pieces):
        encoder = literal_tokenizer(tokenizer)
        pieces = [
            piece if piece.literal else replace(piece, text=encoder.hide(piece.text)) for piece in pieces
        ]
        placeholders = [encoder.hide_placeholder(placeholder) for placeholder in placeholders]
    text, learned, media, cut = _joined(pieces, placeholders)
    ids, spans = _encode_text(encoder, text, cut)
    starts = [start for start, _ in spans]
    encoded = Encoded(ids, [IGNORE_INDEX] * len(ids))
    if any(weight != 1 for *_, weight in learned):
        encoded.weights = [1.0] * len(ids)
    for begin, stop, weight in learned:
        place = slice(bisect_left(starts, begin), bisect_left(starts, stop))
        encoded.labels[place] = ids[place]
        if encoded.weights is not None:
            encoded.weights[place] = [weight] * len(ids[place])

    def in_tokens(begin: int, runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        return [(bisect_left(starts, begin + start), bisect_left(starts, begin + end)) for start, end in runs]

    for begin, placeholder in media:
        encoded.media_spans += in_tokens(begin, [(0, len(placeholder.text))])
        encoded.image_bound += in_tokens(begin, placeholder.runs)
        encoded.audio_bound += in_tokens(begin, placeholder.audio_runs)
    for first, last in encoded.image_bound + encoded.audio_bound:
        assert len(set(ids[first:last])) == 1, (first, last, ids[first:last])
    return encoded


def _joined(
    pieces: Sequence[Piece], placeholders: Sequence[Placeholder]
) -> tuple[str, list[tuple[int, int, float]], list[tuple[int, Placeholder]], int | None]:
    """Join the pieces: the text, and in its characters what is learned, with its weight, the media and the cut."""
    parts: list[str] = []
    learned: list[tuple[int, int, float]] = []
    media: list[tuple[int, Placeholder]] = []
    cut = None
    length = 0
    for piece in pieces:
        text = piece.text
        if piece.answer_start:
            cut = length
        if piece.media is not None:
            placeholder = placeholders[piece.media.index]
            text = placeholder.text
            media.append((length, placeholder))
        elif piece.weight:
            learned.append((length, length + len(text), piece.weight))
        parts.append(text)
        length += len(text)
    return "".join(parts), learned, media, cut


def _encode_text(tokenizer: Any, text: str, cut: int | None) -> tuple[list[int], list[tuple[int, int]]]:
    """Encode the text; the tokens up to ``cut`` are those of the text up to there alone.

    Only an answer that starts with white space can grow together with the prompt in front of it; then the two
    are encoded apart.
    """
    if cut is None or not text[cut : cut + 1].isspace():
        encoding = tokenizer(text, return_offsets_mapping=True)
        return encoding["input_ids"], encoding["offset_mapping"]
    prompt = tokenizer(text[:cut], return_offsets_mapping=True)
    # Behind a letter that is then taken off, since the answer does not start a sequence.
    answer = tokenizer(f"a{text[cut:]}", add_special_tokens=False, return_offsets_mapping=True)
    spans = answer["offset_mapping"]
    first = next(index for index, (start, _) in enumerate(spans) if start >= 1)
    assert all(end <= 1 for _, end in spans[:first]), (text[cut : cut + 20], spans[: first + 1])
    shifted = [(start - 1 + cut, end - 1 + cut) for start, end in spans[first:]]
    return prompt["input_ids"] + answer["input_ids"][first:], prompt["offset_mapping"] + shifted


def truncate(encoded: Encoded, limit: int) -> Encoded:
    """Cut at ``limit`` tokens, or in front of the image or video that the limit falls into.

    Args:
        encoded: The conversation.
        limit: Longest sequence, in tokens.

    Returns:
        The conversation, at most ``limit`` tokens long; every image in it is whole.
    """
    if len(encoded.input_ids) <= limit:
        return encoded
    limit = next((start for start, end in encoded.media_spans if start < limit < end), limit)

    def whole(bounds: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        return [(start, end) for start, end in bounds if end <= limit]

    return Encoded(
        encoded.input_ids[:limit],
        encoded.labels[:limit],
        whole(encoded.image_bound),
        whole(encoded.audio_bound),
        whole(encoded.media_spans),
        None if encoded.weights is None else encoded.weights[:limit],
    )


_FIRST_STAND_IN = 0x100000  # of Unicode's last private plane


class LiteralTokenizer:
    """Encodes texts in which the names of tokens are plain text, and stand-ins are the tokens.

    Args:
        tokenizer: The checkpoint's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        tokens = state["added_tokens"]
        self._stand_ins = {token["content"]: chr(_FIRST_STAND_IN + n) for n, token in enumerate(tokens)}
        # V-2's marks are no added tokens: its normalizer replaces them, and the text is not cut there.
        for mark in ("<用户>", "<AI>"):
            stand_in = chr(_FIRST_STAND_IN + len(self._stand_ins))
            if _rename_pattern(state["normalizer"], mark, stand_in):
                self._stand_ins[mark] = stand_in
        for token in tokens:
            token["special"] = True  # encode_special_tokens switches off those alone
        self._backend = Tokenizer.from_str(json.dumps(state))
        self._backend.encode_special_tokens = True
        kept = ("lstrip", "rstrip", "single_word", "normalized")
        added = [
            AddedToken(self._stand_ins[token["content"]], special=False, **{key: token[key] for key in kept})
            for token in tokens
        ]
        self._backend.add_tokens(added)
        ids = [self._backend.token_to_id(each.content) for each in added]
        self._ids = {stand_in: token["id"] for stand_in, token in zip(ids, tokens, strict=True)}
        self._names = any_of(self._stand_ins)

    def hide(self, text: str) -> str:
        """A text of the prompt's structure, with stand-ins for its tokens."""
        return self._names.sub(lambda found: self._stand_ins[found.group()], text)

    def hide_placeholder(self, placeholder: Placeholder) -> Placeholder:
        """The same for the placeholder of an image or video."""
        text = placeholder.text
        runs, audio_runs = (
            tuple((len(self.hide(text[:start])), len(self.hide(text[:end]))) for start, end in each)
            for each in (placeholder.runs, placeholder.audio_runs)
        )
        return Placeholder(self.hide(text), runs, audio_runs)

    def __call__(self, text: str, *, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        """Encode a text; called as transformers' tokenizers are."""
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return {
            "input_ids": [self._ids.get(token, token) for token in encoding.ids],
            "offset_mapping": encoding.offsets,
        }


@lru_cache(maxsize=4)
def literal_tokenizer(tokenizer: PreTrainedTokenizerFast) -> LiteralTokenizer:
    """The checkpoint's ``LiteralTokenizer``; making one takes seconds for a large vocabulary."""
    return LiteralTokenizer(tokenizer)


def _rename_pattern(normalizer: Any, text: str, new: str) -> bool:
    """Have a normalizer replace another text; whether it replaced the first."""
    if isinstance(normalizer, list):
        return any([_rename_pattern(each, text, new) for each in normalizer])
    if not isinstance(normalizer, dict):
        return False
    if normalizer.get("pattern") == {"String": text}:
        normalizer["pattern"] = {"String": new}
        return True
    return _rename_pattern(normalizer.get("normalizers"), text, new)

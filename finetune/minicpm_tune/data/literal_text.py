"""Control texts as plain text: a tokenizer that reads ``<|im_end|>`` in a message as seven characters or so.

The tokens of the prompt's own structure and those of a literal text must be told apart in one text, which is encoded
once. So the structure's tokens are replaced by characters that no text holds and that stand for the same ids, and the
tokens' own names are switched off.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from minicpm_tune.data.placeholders import Placeholder

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
        self._backend.add_tokens(
            [
                AddedToken(
                    self._stand_ins[token["content"]], special=False, **{key: token[key] for key in kept}
                )
                for token in tokens
            ]
        )
        self._ids = {
            self._backend.token_to_id(self._stand_ins[token["content"]]): token["id"] for token in tokens
        }
        names = sorted(self._stand_ins, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def hide(self, text: str) -> str:
        """A text of the prompt's structure, with stand-ins for its tokens."""
        return self._names.sub(lambda found: self._stand_ins[found.group()], text)

    def hide_placeholder(self, placeholder: Placeholder) -> Placeholder:
        """The same for the placeholder of an image or video."""
        text = placeholder.text
        runs = tuple(
            (len(self.hide(text[:start])), len(self.hide(text[:end]))) for start, end in placeholder.runs
        )
        return Placeholder(self.hide(text), runs, 1)

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

"""A model's vocabulary: whether tokenizer, embeddings and configuration agree, and tokens that a run adds.

New tokens are ordinary ones: an answer shows them, and text is split at them before anything else. Their ids
follow those of the tokenizer; the embeddings grow where they have no row for them yet.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.checkpoints.weight_files import has_weights, tensor_shape
from minicpm_tune.errors import UserError


class VocabularyError(UserError):
    """A tokenizer, embeddings or new tokens that don't fit each other."""


def read_new_tokens(name: str) -> tuple[str, ...]:
    """Read the file of ``--new_tokens``: UTF-8 text with a token in each line.

    Raises:
        VocabularyError: When it can't be read, holds no token, or one twice.
    """
    path = Path(name).expanduser()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise VocabularyError(
            f"--new_tokens {name}: can't be read ({error}), expected a UTF-8 text file with a token in each line."
        ) from error
    tokens = tuple(line for line in lines if line)
    if not tokens:
        raise VocabularyError(f"--new_tokens {name}: found no token, expected one in each line.")
    twice = next((token for token in tokens if tokens.count(token) > 1), None)
    if twice is not None:
        raise VocabularyError(
            f"--new_tokens {name}: found {twice!r} more than once. Remove one of the lines."
        )
    return tokens


def add_tokens(tokenizer: PreTrainedTokenizerFast, tokens: Iterable[str]) -> dict[str, int]:
    """Add tokens to a tokenizer.

    Returns:
        Token -> id of those that it did not have.
    """
    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in new])
    ids = tokenizer.get_vocab()
    return {token: ids[token] for token in new}


def check_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerFast, generation: Generation) -> None:
    """Check that every token has its row in the embeddings; reads file headers alone.

    Raises:
        VocabularyError: When the tokenizer or the configuration does not fit the stored embeddings.
    """
    name = f"{generation.modules['embeddings'][0]}.weight"
    shape = tensor_shape(folder, name) if has_weights(folder) else None
    if shape is None:
        return
    rows = shape[0]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stated = config.get("vocab_size", config.get("text_config", {}).get("vocab_size", rows))
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    found = (
        f"{folder}: the highest token id is {highest} ({token!r}), the embeddings have {rows} rows, and config.json "
        f"says vocab_size {stated}."
    )
    if stated != rows:
        raise VocabularyError(
            f"{found} Expected as many rows as vocab_size says. Set vocab_size to {rows} if the embeddings were "
            "resized on purpose, or download the model again."
        )
    if highest >= rows:
        raise VocabularyError(
            f"{found} Expected a row for every token. Take the tokenizer files of the released model, and give the "
            "tokens to add with --new_tokens FILE."
        )


def write_added_tokens(folder: Path, tokens: Mapping[str, int]) -> None:
    """Write tokens into the tokenizer files of a saved model or adapter.

    Args:
        folder: Where the tokenizer files of the base model were copied to.
        tokens: Token -> id, from ``add_tokens``.
    """
    if not tokens:
        return
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": False}
    entries = {index: {"content": token, **flags} for token, index in tokens.items()}
    _edit_json(folder / "tokenizer.json", lambda content: _with_added(content, entries))
    _edit_json(folder / "tokenizer_config.json", lambda content: _with_decoder(content, entries))
    _edit_json(folder / "added_tokens.json", lambda content: {**content, **tokens})


def _with_added(content: dict[str, Any], entries: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    own = [entry for entry in content.get("added_tokens", []) if entry["id"] not in entries]
    return content | {"added_tokens": own + [{"id": index, **entry} for index, entry in entries.items()]}


def _with_decoder(content: dict[str, Any], entries: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    own = content.get("added_tokens_decoder", {})
    return content | {"added_tokens_decoder": own | {str(index): entry for index, entry in entries.items()}}


def _edit_json(path: Path, edit: Any) -> None:
    if path.is_file():
        content = edit(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

"""A model's vocabulary: its tokenizer, whether everything agrees on it, and tokens that a run adds.

Nothing here runs code from the folder. Tokenizers are loaded as plain fast tokenizers from
``tokenizer.json``, because on transformers 5 the released classes lose their pre-tokenizer (2.6 and later)
or rebuild their normalizer (Llama-based ones). MiniCPM-V 2.0 and InternLM-XComposer2 have only a SentencePiece
``tokenizer.model``; their fast tokenizers are built from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf
from transformers.tokenization_utils_base import generate_merges

from minicpm_tune.checkpoints.model_folder import ModelFolderError, chat_template, read_settings
from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.checkpoints.weight_files import has_weights, tensor_shape
from minicpm_tune.errors import UserError
from minicpm_tune.files import write_json

# Keys of tokenizer_config.json that are for the released classes, not for a plain tokenizer.
_CLASS_KEYS = ("tokenizer_class", "auto_map", "added_tokens_decoder", "backend", "processor_class")
SPACE = "\u2581"  # SentencePiece's visible space
_PRIVATE_AREA = 0xF0000  # Unicode's supplementary private use area A, 65534 characters
_BPE_MODEL = 2  # TrainerSpec.ModelType in sentencepiece_model.proto
_NORMAL, _USER_DEFINED = 1, 4  # ModelProto.SentencePiece.Type


class VocabularyError(UserError):
    """A tokenizer, embeddings or new tokens that don't fit each other."""


class TokenizerError(UserError):
    """A tokenizer file that can't be used."""


def load_tokenizer(folder: str | Path, generation: Generation) -> PreTrainedTokenizerFast:
    """Load a model folder's tokenizer as a plain fast tokenizer.

    Args:
        folder: The model folder.
        generation: Its generation, which says whether there is a ``tokenizer.json``.

    Returns:
        The tokenizer, with the folder's special tokens and chat template (V-2 has none).

    Raises:
        ModelFolderError: If the tokenizer's files are missing.
    """
    folder = Path(folder)
    file = folder / ("tokenizer.model" if generation.tokenizer == "sentencepiece" else "tokenizer.json")
    if not file.is_file():
        raise ModelFolderError(
            f"{folder}: found no {file.name}, expected the model's own tokenizer. Copy the tokenizer files into "
            "the folder, or download the model again."
        )
    settings = read_settings(folder, "tokenizer_config.json")
    decoder = settings.get("added_tokens_decoder", {})
    settings = {key: value for key, value in settings.items() if key not in _CLASS_KEYS}
    settings["chat_template"] = chat_template(folder, settings) or generation.chat_template
    if generation.tokenizer == "sentencepiece":
        listed = [entry for _, entry in sorted(decoder.items(), key=lambda item: int(item[0]))]
        special = [entry["content"] for entry in listed if entry.get("special", True)]
        special += [token for token in generation.special_tokens if token not in special]
        add_bos = settings.get("add_bos_token", True)
        backend = build_tokenizer(file, special_tokens=special, add_bos=add_bos)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
        add_tokens(tokenizer, [entry["content"] for entry in listed if entry["content"] not in special])
        return tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), **settings)
    vocabulary = tokenizer.get_vocab()
    missing = [entry["content"] for entry in decoder.values() if entry["content"] not in vocabulary]
    if missing:
        raise ModelFolderError(
            f"{file}: lacks {', '.join(missing[:5])}, which tokenizer_config.json lists, "
            "expected both to hold the same tokens. Download the tokenizer files again."
        )
    return tokenizer


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
    with _edited(folder / "tokenizer.json") as content:
        own = [entry for entry in content.get("added_tokens", []) if entry["id"] not in entries]
        content["added_tokens"] = own + [{"id": index, **entry} for index, entry in entries.items()]
    with _edited(folder / "tokenizer_config.json") as content:
        decoder = content.setdefault("added_tokens_decoder", {})
        decoder.update({str(index): entry for index, entry in entries.items()})
    with _edited(folder / "added_tokens.json") as content:
        content.update(tokens)


@contextmanager
def _edited(path: Path) -> Iterator[dict[str, Any]]:
    """The content of a JSON file, which is written back afterwards; nothing is written where there is none."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    yield content
    if path.is_file():
        write_json(path, content)


def build_tokenizer(path: Path, *, special_tokens: list[str], add_bos: bool) -> Tokenizer:
    """Build a fast tokenizer that gives the ids of SentencePiece in LlamaTokenizer's legacy mode.

    Source: SentencePiece's byte-pair encoding (merge the adjacent pair whose piece has the best score)
    and LlamaTokenizer of transformers 4. Checked by ``tests/checkpoints/test_vocabulary_sentencepiece_tokenizer.py``.

    Args:
        path: The ``tokenizer.model`` file.
        special_tokens: Texts at which the input is split before SentencePiece sees it.
        add_bos: Whether every encoded text starts with ``<s>``.

    Raises:
        TokenizerError: If the file holds another kind of model.
    """
    model = import_protobuf().ModelProto()
    model.ParseFromString(path.read_bytes())
    if model.trainer_spec.model_type != _BPE_MODEL:
        raise TokenizerError(
            f"{path}: found SentencePiece model type {model.trainer_spec.model_type}, expected {_BPE_MODEL} "
            "(byte-pair encoding). Use the tokenizer.model of the released model."
        )
    user_defined = [piece.piece for piece in model.pieces if piece.type == _USER_DEFINED]
    shown = [piece for piece in user_defined if piece not in special_tokens]
    hidden = {piece: chr(_PRIVATE_AREA + index) for index, piece in enumerate(shown)}
    vocabulary = {hidden.get(piece.piece, piece.piece): index for index, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    tokenizer = Tokenizer(
        BPE(vocabulary, generate_merges(scores, scores), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    by_length = sorted(hidden.items(), key=lambda item: -len(item[0]))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE)] * model.normalizer_spec.add_dummy_prefix
        + [normalizers.Replace(" ", SPACE)]
        + [normalizers.Replace(text, character) for text, character in by_length]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(character, text) for text, character in by_length]
        + [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special_tokens])
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return tokenizer

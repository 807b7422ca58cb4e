"""Fast tokenizers built from a SentencePiece ``tokenizer.model``: MiniCPM-V 2.0, InternLM-XComposer2.

The released tokenizer of MiniCPM-V 2.0 is a LlamaTokenizer in legacy mode: the text is split at the special
tokens of tokenizer_config.json, and SentencePiece encodes each stretch between them with a space in front.
transformers 5 has no such mode. Its conversion turns SentencePiece's *user-defined* pieces (``<用户>``,
``<AI>``, ``"\\n"``) into added tokens, so that the text after each of them wrongly gets a space in front.
Here they stay inside the stretch: the normalizer replaces each by one private character, which no merge rule
knows, and the vocabulary gives that character the piece's id.

InternLM-XComposer2's model puts no space in front. Its turn marks are user-defined pieces, which are made
special tokens here so that prompts can name them.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers.convert_slow_tokenizer import import_protobuf
from transformers.tokenization_utils_base import generate_merges

from minicpm_tune.errors import UserError

SPACE = "\u2581"  # SentencePiece's visible space
_PRIVATE_AREA = 0xF0000  # Unicode's supplementary private use area A, 65534 characters
_BPE_MODEL = 2  # TrainerSpec.ModelType in sentencepiece_model.proto
_USER_DEFINED = 4  # ModelProto.SentencePiece.Type
_UNUSED = 5


class TokenizerError(UserError):
    """A tokenizer file that can't be used."""


def build_tokenizer(path: Path, *, special_tokens: list[str], add_bos: bool) -> Tokenizer:
    """Build a fast tokenizer that gives the ids of SentencePiece in LlamaTokenizer's legacy mode.

    Source: SentencePiece's byte-pair encoding (merge the adjacent pair whose piece has the best score)
    and LlamaTokenizer of transformers 4. Checked by ``tests/checkpoints/test_sentencepiece_tokenizer.py``.

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
    hidden = _private_characters(model.pieces, special_tokens)
    names = [hidden.get(piece.piece, piece.piece) for piece in model.pieces]
    vocabulary = {name: index for index, name in enumerate(names)}
    whole = {piece.piece for piece in model.pieces if piece.type in (_USER_DEFINED, _UNUSED)}
    scores = {
        piece.piece: piece.score for piece in model.pieces if piece.type == 1 and piece.piece not in whole
    }
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


def _private_characters(pieces, special_tokens: list[str]) -> dict[str, str]:
    hidden: dict[str, str] = {}
    for piece in pieces:
        if piece.type == _USER_DEFINED and piece.piece not in special_tokens:
            hidden[piece.piece] = chr(_PRIVATE_AREA + len(hidden))
    return hidden

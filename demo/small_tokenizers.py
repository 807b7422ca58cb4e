"""Small tokenizers, trained on the spot, with the special tokens of the released ones.

Three kinds: byte-level BPE (2.5, 2.6, o-2.6, 4.5 and later), BPE with byte fallback in a tokenizer.json
(V-4), and a SentencePiece tokenizer.model (V-2, InternLM-XComposer2). Any text can be encoded: what was
not in the training sentences becomes bytes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

_SPACE = "\u2581"  # SentencePiece's visible space
_GPT_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_V2_MARKERS = ("<用户>", "<AI>", "\n")
_XC2_MARKS = ["[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"]

# The special tokens of the released tokenizers, in the order of their ids.
_IMAGE = ["<image>", "</image>"]
_MARKS = ["<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<point>", "</point>"]
_SLICE = ["<slice>", "</slice>"]
_IMAGE_ID = ["<image_id>", "</image_id>"]
_UNIT = ["<unit>", "</unit>"]
_CHATML = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_SPEECH = ["audio_start", "audio", "audio_end", "spk_bos", "spk", "spk_eos", "tts_bos", "tts_eos"]
_NATIVE = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<unk>"),
    *_IMAGE, *_SLICE, *_IMAGE_ID,
    *("<|image_pad|>", "<|video_pad|>", "<|audio_start|>", "<|audio_end|>", "<tool_call>", "</tool_call>"),
]  # fmt: skip
_THINK = ["<think>", "</think>"]
_V4_WORDS = ["\n", "assistant", "user", "system"]
SPECIAL_TOKENS = {
    "v2": [*_IMAGE, *_MARKS, *_SLICE],
    "v2_5": [
        *("<|begin_of_text|>", "<|end_of_text|>", "<unk>"),
        *(f"<|reserved_special_token_{i}|>" for i in (1, 2, 3)),
        *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
        *_IMAGE, *_MARKS, *_SLICE,
    ],
    "v2_6": [
        *_CHATML, *_IMAGE, *_MARKS, *_SLICE, *_IMAGE_ID,
        *(f"<|reserved_special_token_{i}|>" for i in range(6)),
    ],
    "o2_6": [*_CHATML, *_IMAGE, *_MARKS, *_SLICE, *_IMAGE_ID, *_UNIT, *(f"<|{name}|>" for name in _SPEECH)],
    "o4_5": [
        *_CHATML, *_THINK, *_IMAGE, *_MARKS, *_SLICE, *_IMAGE_ID, *_UNIT, *(f"<|{name}|>" for name in _SPEECH),
    ],
    "v4": [
        *("<unk>", "<s>", "</s>"), *_IMAGE_ID, *_IMAGE, *_MARKS, *_SLICE, *_V4_WORDS,
        *("<|im_end|>", "<|im_start|>"),
    ],
    "v4_5": [*_CHATML, *_THINK, *_IMAGE, *_MARKS, *_SLICE, *_IMAGE_ID],
    "v4_6": _NATIVE,
    "v4_6_thinking": _NATIVE,
    "v4_7": _NATIVE,
    "v4_7_moe": _NATIVE,
    "ocr_1": _NATIVE,
    "xc2_7b": _XC2_MARKS,
    "xc2_vl_7b": _XC2_MARKS,
    "xc2_4khd_7b": _XC2_MARKS,
}  # fmt: skip
PLAIN_TOKENS = (*_V4_WORDS, *_THINK)  # listed in the released files, but no special tokens there


def byte_level(
    sentences: Sequence[str],
    special: Sequence[str],
    *,
    digits: str = "{1}",
    first: bool = False,
    bos: str | None = None,
    plain: Sequence[str] = (),
) -> Tokenizer:
    """Train a byte-level BPE tokenizer, as GPT-2, Llama 3 and Qwen have.

    Args:
        sentences: What to train on.
        special: The special tokens, in the order of their ids.
        digits: How many digits make one word, as the end of a regular expression.
        first: Special tokens get the first ids (4.6, 4.7), not the last.
        bos: A token that is put in front of every text.
        plain: Those of ``special`` that decoding does not leave out.

    Returns:
        The tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_GPT_SPLIT.replace("{DIGITS}", digits)), behavior="isolated")
    whole_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, whole_words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(special) if first else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    _add_special_tokens(tokenizer, special, plain)
    if bos is not None:
        bos_id = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, bos_id)]
        )
    return tokenizer


def byte_fallback(
    sentences: Sequence[str], special: Sequence[str], *, plain: Sequence[str] = ()
) -> Tokenizer:
    """Train a BPE tokenizer in Llama's manner: spaces made visible, unknown characters as bytes.

    Args:
        sentences: What to train on.
        special: The special tokens; those that start with ``<|`` get the last ids, the others the first.
        plain: Those of ``special`` that decoding does not leave out.

    Returns:
        The tokenizer, which puts ``<s>`` in front of every text.
    """
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", _SPACE)
    trained.pre_tokenizer = pre_tokenizers.Split(_SPACE, behavior="merged_with_next")
    trained.train_from_iterator(sentences, trainers.BpeTrainer(vocab_size=1000, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    last = [token for token in special if token.startswith("<|")]
    begin = [token for token in special if token not in last]
    names = dict.fromkeys([*begin, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]])
    vocabulary = {name: index for index, name in enumerate(names)}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _add_special_tokens(tokenizer, [*begin, *last], plain)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def sentencepiece_model(
    sentences: Sequence[str], special: Sequence[str], *, dummy_prefix: bool = True
) -> bytes:
    """Train a tokenizer.model: ``<unk> <s> </s>``, then markers, then pieces.

    Args:
        sentences: What to train on.
        special: The special tokens behind the first three.
        dummy_prefix: As in V-2: a space is put in front of every text, and V-2's markers are pieces. False
            for InternLM-XComposer2.

    Returns:
        The content of the file.
    """
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=content,
        model_type="bpe",
        vocab_size=500,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        byte_fallback=True,
        user_defined_symbols=[*special, *(_V2_MARKERS if dummy_prefix else ())],
        add_dummy_prefix=dummy_prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return content.getvalue()


def _add_special_tokens(tokenizer: Tokenizer, special: Sequence[str], plain: Sequence[str]) -> None:
    for token in special:
        added = AddedToken(token, normalized=False, special=token not in plain)
        (tokenizer.add_tokens if token in plain else tokenizer.add_special_tokens)([added])

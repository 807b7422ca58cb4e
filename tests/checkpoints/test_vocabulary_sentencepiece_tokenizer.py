"""MiniCPM-V 2.0's tokenizer against SentencePiece itself, and what a missing file says."""

import random
import re
import shutil

import pytest
import sentencepiece

from minicpm_tune.checkpoints.model_folder import ModelFolderError, read_config
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.checkpoints.vocabulary import TokenizerError, build_tokenizer, load_tokenizer
from support.golden_checkpoints import checkpoint_folder, processing
from support.paths import GOLDENS

WORDS = [
    "Two cats", "\n", " ", "  ", "<AI>", "<用户>", "<image>", "</image>", "<unk>", "é🎉", "the quick brown",
    "There are three", "\n\n", "<", "A", "x", "▁", "</s>", "<r1>", "图片",
]  # fmt: skip


def legacy_llama_ids(model, special, text):
    """What LlamaTokenizer in legacy mode does: SentencePiece on every stretch between special tokens."""
    ids = [model.bos_id()]
    for stretch in re.split("(" + "|".join(map(re.escape, special)) + ")", text):
        if stretch:
            ids += [model.piece_to_id(stretch)] if stretch in special else model.encode(stretch)
    return ids


def test_ids_of_v2_are_those_of_sentencepiece():
    model = sentencepiece.SentencePieceProcessor(model_file=str(GOLDENS / "v2/tokenizer/tokenizer.model"))
    tokenizer = processing("v2").tokenizer
    special = [token.content for token in tokenizer.added_tokens_decoder.values()]
    draw = random.Random(3)
    for _ in range(3000):
        text = "".join(draw.choice(WORDS) for _ in range(draw.randint(1, 12)))
        assert tokenizer(text)["input_ids"] == legacy_llama_ids(model, special, text), text


def test_text_after_a_user_defined_piece_gets_no_space():
    tokenizer = processing("v2").tokenizer
    ids = tokenizer("<用户>Hi<AI>Two cats")["input_ids"]
    assert tokenizer.decode(ids) == "<s> <用户>Hi<AI>Two cats"
    assert len(ids) == len(tokenizer("<用户>Hi")["input_ids"]) + len(["<AI>", "T", "wo", "▁cats"])


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    model = (GOLDENS / "v2/tokenizer/tokenizer.model").read_bytes()
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    proto.ParseFromString(model)
    proto.trainer_spec.model_type = 1
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(TokenizerError, match="model type 1, expected 2"):
        build_tokenizer(tmp_path / "tokenizer.model", special_tokens=[], add_bos=True)


@pytest.mark.parametrize(("name", "file"), [("v2", "tokenizer.model"), ("v2_6", "tokenizer.json")])
def test_a_missing_tokenizer_is_named(name, file, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint_folder(name), folder)
    (folder / file).unlink()
    with pytest.raises(ModelFolderError, match=f"found no {file}, expected the model's own tokenizer"):
        load_tokenizer(folder, GENERATIONS[name])


def test_a_folder_without_config_is_named(tmp_path):
    with pytest.raises(ModelFolderError, match=r"found no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ModelFolderError, match="If this is an adapter folder, give"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelFolderError, match="not readable as JSON"):
        read_config(tmp_path)

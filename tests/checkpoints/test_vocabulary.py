"""Tokenizer, embeddings and configuration agree; new tokens are read, added and written."""

import json

import pytest
from safetensors.torch import load_file, save_file
from transformers import AddedToken

from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.checkpoints.vocabulary import (
    VocabularyError,
    add_tokens,
    check_vocabulary,
    load_tokenizer,
    read_new_tokens,
    write_added_tokens,
)
from support.tiny_checkpoints import ALL, checkpoint, copied, edit_json

TOKENS = ["<cat_a>", "☃snow", "<|point|>"]
TEXT = "a <cat_a> and ☃snow,<|point|>!"


@pytest.mark.parametrize("name", [*ALL, "xc2_7b"])
def test_a_released_checkpoint_has_a_row_for_every_token(name):
    row = GENERATIONS[name]
    check_vocabulary(checkpoint(name), load_tokenizer(checkpoint(name), row), row)


def test_a_tokenizer_beyond_the_embeddings_is_refused():
    tokenizer = load_tokenizer(checkpoint("v2_6"), GENERATIONS["v2_6"])
    tokenizer.add_tokens([AddedToken("<more>")])
    message = (
        r"highest token id is 470 \('<more>'\), the embeddings have 470 rows, .* vocab_size 470.*--new_tokens"
    )
    with pytest.raises(VocabularyError, match=message):
        check_vocabulary(checkpoint("v2_6"), tokenizer, GENERATIONS["v2_6"])


def test_embeddings_beyond_the_configuration_are_refused(tmp_path):
    folder = copied(checkpoint("v2_6"), tmp_path / "grown")
    tensors = load_file(folder / "model.safetensors")
    for name in ("llm.model.embed_tokens.weight", "llm.lm_head.weight"):
        tensors[name] = tensors[name].repeat(2, 1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    row = GENERATIONS["v2_6"]
    with pytest.raises(
        VocabularyError, match=r"have 940 rows, and .* vocab_size 470\. .*Set vocab_size to 940"
    ):
        check_vocabulary(folder, load_tokenizer(folder, row), row)
    edit_json(folder / "config.json", vocab_size=940)
    check_vocabulary(folder, load_tokenizer(folder, row), row)


@pytest.mark.parametrize("name", ["v2", "v2_5", "v2_6", "v4_6", "xc2_7b"])
def test_written_tokens_are_those_that_were_added(name, tmp_path):
    row = GENERATIONS[name]
    tokenizer = load_tokenizer(checkpoint(name), row)
    size = len(tokenizer)
    plain = tokenizer("a cat")["input_ids"]
    added = add_tokens(tokenizer, [*TOKENS, row.turn_end])
    assert added == dict(zip(TOKENS, range(size, size + 3), strict=True))
    folder = copied(checkpoint(name), tmp_path / "saved")
    write_added_tokens(folder, added)
    write_added_tokens(folder, added)  # as after a second save
    again = load_tokenizer(folder, row)
    ids = tokenizer(TEXT)["input_ids"]
    assert again(TEXT)["input_ids"] == ids
    assert set(added.values()) < set(ids)
    assert again("a cat")["input_ids"] == plain
    shown = again.decode(ids, skip_special_tokens=True)
    assert all(token in shown for token in TOKENS)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["added_tokens_decoder"][str(size)]["content"] == "<cat_a>"


def test_the_file_has_a_token_in_each_line(tmp_path):
    path = tmp_path / "tokens.txt"
    path.write_bytes("\ufeff<cat_a>\r\n\n  ☃snow \n".encode())
    assert read_new_tokens(str(path)) == ("<cat_a>", "☃snow")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", "found no token, expected one in each line"),
        (b"<a>\n<b>\n<a>\n", "found '<a>' more than once"),
        (b"caf\xe9\n", "can't be read .*expected a UTF-8 text file"),
    ],
)
def test_a_file_without_usable_tokens_is_refused(content, message, tmp_path):
    path = tmp_path / "tokens.txt"
    path.write_bytes(content)
    with pytest.raises(VocabularyError, match=message):
        read_new_tokens(str(path))
    with pytest.raises(VocabularyError, match=r"--new_tokens .*none\.txt: can't be read"):
        read_new_tokens(str(tmp_path / "none.txt"))

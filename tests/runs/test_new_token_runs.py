"""--new_tokens through the launcher: full tuning and adapters, also divided by ZeRO-3, and a run that continues."""

import json

import pytest

from minicpm_tune.answering.load import ModelChoice, load_for_inference
from minicpm_tune.checkpoints.weight_files import stored_tensors
from minicpm_tune.lora.adapter_folders import read_adapter_folder
from support import finetune_runs
from support.tiny_checkpoints import checkpoint

TOKENS = {"<cat_a>": 470, "<dog_b>": 471}
ADAPTER = ("--use_lora", "true", "--tune_llm", "false", "--tune_vision", "false")
ZERO_3 = ("--deepspeed", "ds_config_zero3.json")


@pytest.fixture
def data(tmp_path):
    """Rows whose answers are new tokens."""
    path = finetune_runs.write_data(tmp_path / "data", rows=4, text_only=())
    rows = json.loads(path.read_text())
    for number, row in enumerate(rows):
        row["conversations"][1]["content"] = list(TOKENS)[number % 2]
    path.write_text(json.dumps(rows))
    (tmp_path / "tokens.txt").write_text("\n".join(TOKENS))
    return path


def train(folder, data, *flags, steps=40):
    found = finetune_runs.train(
        folder, "--learning_rate", "1e-2", "--model_max_length", 512, *flags,
        model=checkpoint("v2_6"), data=data, steps=steps, batch=2, processes=2,
    )  # fmt: skip
    return [line["loss"] for line in found]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--use_lora", "false", "--tune_llm", "true", "--tune_vision", "false"),
        ("--use_lora", "false", "--tune_llm", "true", "--tune_vision", "false", *ZERO_3),
        ADAPTER,
        (*ADAPTER, *ZERO_3),
    ],
    ids=["full", "full-zero3", "lora", "lora-zero3"],
)
def test_new_tokens_are_learned_and_saved(flags, data, tmp_path):
    losses = train(tmp_path, data, "--new_tokens", tmp_path / "tokens.txt", *flags)
    assert losses[-1] < losses[0] / 4
    lora = "true" in flags[:2]
    choice = {"adapter": str(tmp_path / "out")} if lora else {"model_name_or_path": str(tmp_path / "out")}
    model, processing = load_for_inference(ModelChoice(device="cpu", **choice))
    vocabulary = processing.tokenizer.get_vocab()
    assert {token: vocabulary[token] for token in TOKENS} == TOKENS
    assert model.get_input_embeddings().weight.shape[0] == 472
    if not lora:
        shapes = {tensor.name: tensor.shape[0] for tensor in stored_tensors(tmp_path / "out")}
        assert shapes["llm.model.embed_tokens.weight"] == shapes["llm.lm_head.weight"] == 472
        assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 472


@pytest.mark.slow
def test_a_run_that_continues_an_adapter_takes_its_tokens(data, tmp_path):
    first = train(tmp_path / "first", data, "--new_tokens", tmp_path / "tokens.txt", *ADAPTER)
    again = train(tmp_path / "again", data, *ADAPTER, "--lora_weight_path", tmp_path / "first/out", steps=2)
    assert again[0] < first[0] / 4
    assert read_adapter_folder(tmp_path / "again/out").new_tokens == TOKENS

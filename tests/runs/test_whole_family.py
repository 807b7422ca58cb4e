"""The rest of the family in use: an adapter through the command line, packed, then chat and merge."""

import json

import pytest

import chat
import merge_lora
from minicpm_tune.checkpoints.model_folder import read_config, read_generation
from support import finetune_runs, live_runs
from support.live_runs import LORA

pytestmark = pytest.mark.slow
MORE = {"v4_6_thinking": (), "v4_7_moe": ("--lora_experts", "true", "--lora_dropout", "0"), "ocr_1": ()}


def ask(capfd, image, *words):
    question = ("--image", image, "--question", "What is it?", "--max_new_tokens", 3, "--sampling", "false")
    capfd.readouterr()
    assert chat.main([str(word) for word in (*words, *question)]) == 0
    return capfd.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("name", MORE)
def test_an_adapter_is_trained_asked_and_merged(name, tmp_path, capfd):
    model = live_runs.tiny(tmp_path / "model", name)
    data = finetune_runs.write_data(tmp_path / "data", rows=4)
    packed = ("--packing", "true", "--model_max_length", "2048", "--learning_rate", "1e-2")
    lines = finetune_runs.train(
        tmp_path, *LORA, *MORE[name], *packed, model=model, data=data, batch=1, steps=6
    )
    assert lines[-1]["loss"] < lines[0]["loss"]
    adapter, merged = tmp_path / "out", tmp_path / "merged"
    image = next((tmp_path / "data").glob("*.png"))
    answer = ask(capfd, image, "--adapter", adapter)
    words = ("--adapter", adapter, "--output_dir", merged)
    merge_lora.run(merge_lora.parse_flags([str(word) for word in words]))
    assert read_generation(merged).name == name
    assert read_config(merged)["downsample_mode"] == read_config(model)["downsample_mode"]
    assert ask(capfd, image, "--model_name_or_path", merged) == answer
    processor = json.loads((merged / "processor_config.json").read_text())
    assert processor["image_processor"]["downsample_mode"] == read_config(model)["downsample_mode"]

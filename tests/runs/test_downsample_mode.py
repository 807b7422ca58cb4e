"""--downsample_mode of MiniCPM-V 4.6 and 4.7: trained with, recorded, and used again without being asked for."""

import json

import pytest

import merge_lora
from minicpm_tune.answering.load import ModelChoice, find_model, load_for_inference
from minicpm_tune.checkpoints.model_folder import read_config
from minicpm_tune.data.samples import load_processing
from minicpm_tune.errors import UserError
from minicpm_tune.models.loading import load_model
from minicpm_tune.planning.memory_plan import Training, plan
from plan_memory import parse_flags, run
from support import finetune_runs
from support.tiny_checkpoints import checkpoint


def image_tokens(processing):
    return processing.generation.downsampling[processing.media.downsample_mode].patches_per_token


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = finetune_runs.write_data(folder / "data", rows=4)
    finetune_runs.train(
        folder, "--use_lora", "true", "--tune_llm", "false", "--downsample_mode", "4x",
        model=checkpoint("v4_6"), data=data, steps=2, launcher=False,
    )  # fmt: skip
    return folder / "out"


def test_an_adapter_is_used_in_the_mode_of_its_training(adapter):
    assert json.loads((adapter / "base_model.json").read_text())["downsample_mode"] == "4x"
    settings = json.loads((adapter / "processor_config.json").read_text())
    assert settings["image_processor"]["downsample_mode"] == "4x"
    model, processing = load_for_inference(ModelChoice(adapter=str(adapter), dtype="fp32", device="cpu"))
    assert image_tokens(processing) == 4
    assert model.config.downsample_mode == "4x"
    chosen = find_model(ModelChoice(adapter=str(adapter), downsample_mode="16x"))
    assert image_tokens(chosen.processing) == 16


def test_a_merged_model_is_in_the_mode_of_its_adapter(adapter, tmp_path):
    words = ["--adapter", adapter, "--output_dir", tmp_path / "merged"]
    merge_lora.run(merge_lora.parse_flags([str(word) for word in words]))
    assert read_config(tmp_path / "merged")["downsample_mode"] == "4x"
    assert image_tokens(load_processing(tmp_path / "merged")) == 4


def test_a_saved_model_keeps_the_mode_it_was_loaded_in(tmp_path):
    load_model(checkpoint("v4_7"), downsample_mode="4x").save_pretrained(tmp_path)
    assert load_model(tmp_path).config.downsample_mode == "4x"
    assert image_tokens(load_processing(tmp_path)) == 4


def test_a_plan_counts_the_tokens_of_the_mode():
    sizes = {
        mode: plan(checkpoint("v4_6"), Training(model_max_length=8192, downsample_mode=mode))["activations"]
        for mode in ("16x", "4x")
    }
    assert sizes["4x"] != sizes["16x"]
    flags = parse_flags(["--model_name_or_path", str(checkpoint("v2_6")), "--downsample_mode", "4x"])
    with pytest.raises(
        UserError, match=r"--downsample_mode: MiniCPM-V 2\.6 has none, expected MiniCPM-V 4\.6"
    ):
        run(flags)

"""Saved adapters open elsewhere: in the peft of the released code's environment, and with their tokenizer."""

import json

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.checkpoints.vocabulary import load_tokenizer
from support.tiny_checkpoints import checkpoint, saved_adapter

# The fields of peft.LoraConfig in peft 0.10.0, read off that version.
KNOWN_TO_PEFT_0_10 = {
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r",
    "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config",
    "megatron_core", "loftq_config", "use_dora", "layer_replication",
}  # fmt: skip


def written(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, {"modules_to_save": ["embed_tokens", "resampler"], "r": 4, "peft_type": "LORA"}),
        ({"use_dora": True}, {"use_dora": True}),
        ({"use_rslora": True}, {"use_rslora": True}),
        ({"lora_bias": "lora_only"}, {"bias": "lora_only"}),
        ({"lora_layer_replication": "[[0, 2], [0, 2]]"}, {"layer_replication": [[0, 2], [0, 2]]}),
        ({"init_lora_weights": "gaussian"}, {"init_lora_weights": "gaussian"}),
    ],
)
def test_an_adapters_settings_are_those_that_peft_0_10_knows(options, kept, tmp_path):
    saved_adapter(tmp_path, "v2_6", **options)
    config = written(tmp_path)
    assert config.keys() == KNOWN_TO_PEFT_0_10
    assert {name: config[name] for name in kept} == kept


def test_a_newer_setting_that_the_adapter_needs_is_kept(tmp_path):
    """4.6 ties output layer and embeddings; no peft of the old environments runs it."""
    saved_adapter(tmp_path, "v4_6")
    assert written(tmp_path).keys() == KNOWN_TO_PEFT_0_10 | {"ensure_weight_tying"}


def test_dora_tensors_have_the_names_of_peft_0_10(tmp_path):
    saved_adapter(tmp_path, "v2_6", use_dora=True, lora_modules_to_save=["none"])
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        kinds = {name.partition("q_proj.")[2] for name in file.keys() if "q_proj." in name}
    assert kinds == {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"}


@pytest.mark.parametrize("name", ["v2_6", "v4_6"])
def test_the_tokenizer_opens_from_the_adapter(name, tmp_path):
    saved_adapter(tmp_path, name)
    base = checkpoint(name)
    expected = {path.name for path in base.iterdir()} - {
        "config.json", "generation_config.json", "model.safetensors", "configuration_minicpm.py",
        "modeling_minicpmv.py", "resampler.py", "modeling_navit_siglip.py",
    }  # fmt: skip
    own = {"adapter_config.json", "adapter_model.safetensors", "base_model.json"}
    assert {path.name for path in tmp_path.iterdir()} == expected | own | {"README.md"}
    for file in expected - {"README.md"}:
        assert (tmp_path / file).read_bytes() == (base / file).read_bytes(), file
    # The released tokenizer class is not part of the test checkpoint.
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings = {key: value for key, value in settings.items() if key != "auto_map"}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    text = "What is in <image></image>?<|im_end|>"
    expected_ids = load_tokenizer(base, GENERATIONS[name])(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == expected_ids

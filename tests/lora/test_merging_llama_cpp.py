"""--export_lora gguf-names: an adapter under the names of the LLM as a model by itself."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

import merge_lora
from minicpm_tune.lora.adapter_folders import AdapterError
from support.tiny_checkpoints import saved_adapter

PLAIN = {"lora_modules_to_save": ["none"]}
# What convert_lora_to_gguf.py takes off, and names that gguf's tables of these LLMs know.
KNOWN = re.compile(
    r"base_model\.model\.model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.lora_[AB]\.weight"
)


def export(folder):
    words = ["--adapter", folder / "adapter", "--output_dir", folder / "out", "--export_lora", "gguf-names"]
    merge_lora.run(merge_lora.parse_flags([str(word) for word in words]))
    config = json.loads((folder / "out/adapter_config.json").read_text())
    return load_file(folder / "out/adapter_model.safetensors"), config


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("v2_6", "llm.model."), ("v4", "llm.model."), ("v4_5", "llm.model."), ("v4_6", "model.language_model.")],
)
def test_tensors_get_the_names_of_the_llm_alone_and_keep_their_values(name, prefix, tmp_path):
    saved_adapter(tmp_path / "adapter", name, **PLAIN)
    before = load_file(tmp_path / "adapter/adapter_model.safetensors")
    after, config = export(tmp_path)
    assert len(before) > 0
    assert all(KNOWN.fullmatch(key) for key in after)
    expected = {key.replace(f"base_model.model.{prefix}", "base_model.model.model."): key for key in before}
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[key], before[old]) for key, old in expected.items())
    assert (config["r"], config["lora_alpha"]) == (4, 64)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_scale_of_rslora_goes_into_alpha(tmp_path):
    """convert_lora_to_gguf.py knows alpha / r alone; rsLoRA is alpha / sqrt(r)."""
    saved_adapter(tmp_path / "adapter", "v2_6", use_rslora=True, **PLAIN)
    _, config = export(tmp_path)
    assert config["lora_alpha"] / config["r"] == pytest.approx(64 / 4**0.5)
    assert "use_rslora" not in config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"found \d+ tensors besides LoRA weights of the LLM .*--lora_modules_to_save none"),
        (PLAIN | {"use_dora": True}, r"found 8 tensors besides .*lora_magnitude_vector.*without DoRA"),
        (PLAIN | {"lora_bias": "lora_only"}, r"found \d+ tensors besides .*bias"),
        (
            PLAIN | {"lora_target_modules": r"vpm\..*q_proj"},
            r"found 4 tensors besides LoRA weights of the LLM",
        ),
        (PLAIN | {"lora_layer_replication": "[[0, 2], [0, 2]]"}, "found an adapter on replicated layers"),
    ],
)
def test_an_adapter_that_llama_cpp_can_not_express_is_refused(options, message, tmp_path):
    saved_adapter(tmp_path / "adapter", "v2_6", **options)
    with pytest.raises(AdapterError, match=message):
        export(tmp_path)
    assert not (tmp_path / "out").exists()

"""What a merged model or an adapter looks like to others who load it: vLLM, SGLang, llama.cpp, PEFT."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import merge_lora
from minicpm_tune.checkpoints.weight_files import SINGLE_FILES
from minicpm_tune.lora.adapter_folders import read_adapter_folder
from minicpm_tune.lora.loading import load_adapter
from support.golden_checkpoints import checkpoint_folder
from support.golden_models import golden_model
from support.tiny_checkpoints import ALL, SIX, checkpoint, loaded, merged_checkpoint, saved_adapter

PLAIN_KEY = re.compile(
    r"base_model\.model\.llm\.model\.layers\.\d+\.self_attn\.[qkvo]_proj\.lora_[AB]\.weight"
)


def merged(folder, *flags, adapter="adapter"):
    words = ["--adapter", folder / adapter, "--output_dir", folder / "merged", *flags]
    merge_lora.run(merge_lora.parse_flags([str(word) for word in words]))
    return folder / "merged"


def described(folder):
    """Name -> (shape, dtype) of every tensor."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}


@pytest.mark.parametrize("name", ALL)
def test_a_merged_folder_differs_from_its_base_in_the_weights_alone(name):
    base, (out, _) = checkpoint(name), merged_checkpoint(name)
    files = {path.name for path in base.iterdir()}
    assert {path.name for path in out.iterdir()} == files
    for file in files - set(SINGLE_FILES) - {"config.json"}:
        assert (out / file).read_bytes() == (base / file).read_bytes(), file
    tensors, config = described(out), json.loads((out / "config.json").read_text())
    expected = json.loads((base / "config.json").read_text())
    if name in SIX:
        assert config == expected
        assert list(config) == list(expected)
    else:  # transformers' own classes write the dtype into every part of the configuration
        kept = [key for key in expected if not key.endswith("_config")]
        assert {key: config[key] for key in kept} == {key: expected[key] for key in kept}
    assert tensors == described(base)


@pytest.mark.parametrize("name", ["v2", "v2_6"])
def test_tensor_names_and_shapes_are_those_of_the_released_code(name, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(checkpoint_folder(name), base)
    model, about = golden_model(name)
    model.config.name_or_path = str(base)
    model.save_pretrained(base)
    saved_adapter(tmp_path / "adapter", name, base=base)
    expected = {key: tuple(shape) for key, shape in about["parameters"]}
    found = {key: shape for key, (shape, _) in described(merged(tmp_path)).items()}
    if name == "v2":  # a fixed table there, a parameter here
        expected.pop("resampler.pos_embed", None)
        found.pop("resampler.pos_embed", None)
    assert found == expected


def test_what_servers_read_from_a_v2_6_folder_is_there(tmp_path):
    """vLLM and SGLang: architectures and version choose the class; llama.cpp: the tensors' prefixes."""
    saved_adapter(tmp_path / "adapter", "v2_6")
    out = merged(tmp_path, "--dtype", "bf16")
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["MiniCPMV"]
    assert (config["model_type"], config["version"], config["torch_dtype"]) == ("minicpmv", 2.6, "bfloat16")
    needed = {"query_num", "vision_config", "slice_config", "hidden_size", "vocab_size", "rope_theta"}
    assert needed <= set(config)
    assert "text_config" not in config
    for key in ("AutoConfig", "AutoModel", "AutoModelForCausalLM"):
        module = config["auto_map"][key].partition(".")[0]
        assert (out / f"{module}.py").is_file()
    processor = json.loads((out / "preprocessor_config.json").read_text())
    assert processor["processor_class"] == "MiniCPMVProcessor"
    for reference in processor["auto_map"].values():
        assert (out / f"{reference.partition('.')[0]}.py").is_file()
    assert (out / "tokenizer.json").is_file()
    tensors = described(out)
    assert {name.partition(".")[0] for name in tensors} == {"llm", "vpm", "resampler"}
    assert {dtype for _, dtype in tensors.values()} == {"BF16"}
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_weights_above_the_shard_size_are_spread_with_an_index(tmp_path):
    saved_adapter(tmp_path / "adapter", "v2_6")
    out = merged(tmp_path, "--max_shard_size", "500KB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"]) == set(described(checkpoint("v2_6")))


# --- adapters ---


def test_a_plain_adapter_holds_the_llms_lora_weights_and_nothing_else(tmp_path):
    saved_adapter(tmp_path / "adapter", "v2_6", lora_modules_to_save=["none"])
    names = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(names) == 2 * 4 * 2  # layers, projections, A and B
    assert all(PLAIN_KEY.fullmatch(name) for name in names)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    # vLLM takes no other settings than these.
    assert (config["peft_type"], config["bias"], config["modules_to_save"]) == ("LORA", "none", None)
    assert (config["use_dora"], config["r"]) == (False, 4)
    assert config["base_model_name_or_path"] == str(checkpoint("v2_6"))


class ReleasedMiniCPMV(PreTrainedModel, GenerationMixin):
    """Modules named as in the released class, whose forward takes one dictionary."""

    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.llm = Qwen2ForCausalLM(config)
        self.resampler = nn.Module()
        self.resampler.query = nn.Parameter(torch.zeros(16, config.hidden_size))

    def forward(self, data, **kwargs):
        return self.llm(inputs_embeds=self.llm.model.embed_tokens(data["input_ids"]), **kwargs)


def released_model():
    config = json.loads((checkpoint("v2_6") / "config.json").read_text())
    config.pop("model_type")
    model = ReleasedMiniCPMV(Qwen2Config(**config)).eval()
    weights = load_file(checkpoint("v2_6") / "model.safetensors")
    missing, _ = model.load_state_dict(weights, strict=False)
    assert not missing
    return model


@pytest.mark.parametrize("modules", [["none"], ["embed_tokens"]])
def test_an_adapter_opens_in_peft_on_the_released_class_and_on_ours(modules, tmp_path):
    saved = saved_adapter(tmp_path / "adapter", "v2_6", lora_modules_to_save=modules)
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        expected = saved(input_ids=ids).logits
        ours = PeftModel.from_pretrained(loaded(checkpoint("v2_6"), "v2_6"), tmp_path / "adapter").eval()
        theirs = PeftModel.from_pretrained(released_model(), tmp_path / "adapter").eval()
        plain = released_model()({"input_ids": ids}).logits
        assert torch.equal(ours(input_ids=ids).logits, expected)
        found = theirs.base_model({"input_ids": ids}).logits
    assert (found - expected).abs().max() < 1e-5
    assert (plain - expected).abs().max() > 0.1


def test_the_base_of_an_adapter_is_found_by_its_path(tmp_path):
    saved_adapter(tmp_path / "adapter", "v2_6")
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (config.base_model_name_or_path, config.task_type) == (str(checkpoint("v2_6")), "CAUSAL_LM")
    base = Path(config.base_model_name_or_path)
    assert not load_adapter(loaded(base, "v2_6"), read_adapter_folder(tmp_path / "adapter")).training

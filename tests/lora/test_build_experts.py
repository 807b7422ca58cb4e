"""--lora_experts: adapters on the weights of all experts, whose merge and record are right; by default none."""

import json

import pytest
import torch

import merge_lora
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.checkpoints.weight_files import tensor_names
from minicpm_tune.lora.adapter_folders import AdapterError, read_adapter_folder
from minicpm_tune.lora.build import adapted_modules, add_adapter, check_experts
from minicpm_tune.lora.loading import check_adapter
from minicpm_tune.lora.merging import check_convertible
from minicpm_tune.settings.argument_groups import LoraArguments
from support.minicpmv46_cases import our_model
from support.tiny_checkpoints import checkpoint, loaded, logits, saved_adapter

MOE = "v4_7_moe"
MERGE_TOLERANCE = 1e-5  # 1.8e-6, on logits that the adapter changes by 5.8


def adapted(**lora):
    given = LoraArguments(lora_r=2, lora_dropout=0.0, **lora)
    wrapped = add_adapter(our_model(MOE), GENERATIONS[MOE], given, vision=False, resampler=False)
    return wrapped, adapted_modules(wrapped)


@pytest.mark.parametrize("targets", [{}, {"lora_target_modules": "all-linear"}])
def test_experts_and_router_are_left_alone_by_default(targets):
    wrapped, names = adapted(lora_modules_to_save=["none"], **targets)
    assert names
    assert not any(".experts" in name or name.endswith((".gate", ".shared_expert_gate")) for name in names)
    assert any(".shared_expert." in name for name in names) == bool(targets)
    trained = [name for name, value in wrapped.named_parameters() if value.requires_grad]
    assert all(".lora_" in name for name in trained)


def test_every_expert_gets_an_adapter_of_its_own():
    wrapped, names = adapted(lora_experts=True)
    layer = "model.language_model.layers.3.mlp.experts"
    assert [name for name in names if name.startswith(layer)] == [layer, f"{layer}.base_layer"]
    shapes = {
        name.removeprefix(f"base_model.model.{layer}."): tuple(value.shape)
        for name, value in wrapped.named_parameters()
        if name.startswith(f"base_model.model.{layer}.") and "lora_" in name
    }
    experts, rank = 8, 2
    assert shapes == {
        "lora_A.default.weight": (experts * rank, 32),  # down_proj
        "lora_B.default.weight": (64, experts * rank),
        "base_layer.lora_A.default.weight": (experts * rank, 64),  # gate_up_proj
        "base_layer.lora_B.default.weight": (64, experts * rank),
    }
    _, names = adapted(lora_experts=True, lora_layers_to_transform=[3])
    assert {name for name in names if ".experts" in name} == {layer, f"{layer}.base_layer"}


def test_an_adapter_of_experts_is_loaded_and_merged_into_the_released_names(tmp_path):
    expected = logits(saved_adapter(tmp_path / "adapter", MOE, lora_experts=True, lora_dropout=0.0), MOE)
    assert (expected - logits(loaded(checkpoint(MOE), MOE), MOE)).abs().max() > 1
    words = ["--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "merged"]
    merge_lora.run(merge_lora.parse_flags([str(word) for word in words]))
    found = logits(loaded(tmp_path / "merged", MOE), MOE)
    torch.testing.assert_close(found, expected, atol=MERGE_TOLERANCE, rtol=0)
    assert tensor_names(tmp_path / "merged") == tensor_names(checkpoint(MOE))


def test_a_continued_adapter_keeps_its_experts(tmp_path):
    def check(folder, **lora):
        given = LoraArguments(lora_weight_path=str(folder), lora_r=4, lora_dropout=0.0, **lora)
        check_adapter(given, checkpoint(MOE), GENERATIONS[MOE], vision=False, resampler=True)

    saved_adapter(tmp_path / "experts", MOE, lora_experts=True, lora_dropout=0.0)
    check(tmp_path / "experts", lora_experts=True)
    with pytest.raises(AdapterError, match="found an adapter of experts, expected a plain LoRA adapter"):
        check_convertible(read_adapter_folder(tmp_path / "experts"), GENERATIONS[MOE])
    check(tmp_path / "experts")
    saved_adapter(tmp_path / "plain", MOE, lora_dropout=0.0)
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert not config.get("target_parameters")
    with pytest.raises(AdapterError, match="the adapter has none for experts: leave the flag out"):
        check(tmp_path / "plain", lora_experts=True)


@pytest.mark.parametrize(
    ("name", "lora", "message"),
    [
        ("v4_7", {}, r"MiniCPM-V 4\.7 has no experts, expected MiniCPM-V 4\.7-35B-A3B\. Leave the flag out"),
        (MOE, {"lora_dropout": 0.05}, r"found --lora_dropout 0\.05, expected 0: .*Set --lora_dropout 0\."),
        (MOE, {"use_dora": True}, r"found --use_dora True, expected false"),
        (MOE, {"init_lora_weights": "pissa"}, r"found --init_lora_weights pissa, expected true"),
    ],
)
def test_what_experts_cannot_have_is_refused(name, lora, message):
    with pytest.raises(AdapterError, match=message):
        check_experts(GENERATIONS[name], LoraArguments(**{"lora_experts": True, "lora_dropout": 0.0} | lora))

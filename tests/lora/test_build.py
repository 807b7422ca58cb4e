"""What trains: LoRA targets, and what an adapter saves."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict

from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.lora import build
from minicpm_tune.lora.adapter_folders import AdapterError, read_adapter_folder
from minicpm_tune.lora.build import (
    adapted_modules,
    add_adapter,
    restore_output_layer,
    set_frozen_copies_aside,
)
from minicpm_tune.lora.loading import load_adapter
from minicpm_tune.models.parameter_parts import count_parts
from minicpm_tune.settings.argument_groups import LoraArguments
from support.golden_models import SIX, full_batch, golden_model


def trained_parts(model, generation):
    return {
        generation.part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad
    }


@pytest.mark.parametrize("generation", SIX)
def test_the_official_lora_pattern_finds_the_attention_of_the_llm(generation):
    model, _ = golden_model(generation)
    wrapped = add_adapter(model, GENERATIONS[generation], LoraArguments(), vision=False, resampler=True)
    expected = {
        f"llm.model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in ("q", "k", "v", "o")
    }
    assert set(adapted_modules(wrapped)) == expected
    assert trained_parts(wrapped, GENERATIONS[generation]) == {"lora", "resampler", "embeddings"}


def test_all_linear_means_the_linear_layers_of_the_llm():
    model, _ = golden_model("v2_6")
    lora = LoraArguments(lora_target_modules="all-linear", lora_modules_to_save=["none"])
    wrapped = add_adapter(model, GENERATIONS["v2_6"], lora, vision=False, resampler=True)
    assert len(adapted_modules(wrapped)) == 2 * 7
    assert all(name.startswith("llm.model.layers.") for name in adapted_modules(wrapped))
    assert trained_parts(wrapped, GENERATIONS["v2_6"]) == {"lora"}


def test_a_pattern_may_name_the_vision_tower():
    model, _ = golden_model("v2_6")
    lora = LoraArguments(lora_target_modules=r"vpm\..*(q_proj|v_proj)", lora_modules_to_save=["none"])
    wrapped = add_adapter(model, GENERATIONS["v2_6"], lora, vision=False, resampler=True)
    assert len(adapted_modules(wrapped)) == 4


def test_layers_can_be_chosen_by_number():
    model, _ = golden_model("v2_6")
    lora = LoraArguments(lora_layers_to_transform=[1])
    wrapped = add_adapter(model, GENERATIONS["v2_6"], lora, vision=False, resampler=True)
    assert {name.split(".")[3] for name in adapted_modules(wrapped)} == {"1"}


def test_layer_replication_makes_the_llm_taller():
    model, _ = golden_model("v2_6")
    lora = LoraArguments(lora_layer_replication="[[0, 2], [0, 2]]")
    wrapped = add_adapter(model, GENERATIONS["v2_6"], lora, vision=False, resampler=True)
    assert len(wrapped.base_model.model.llm.model.layers) == 4
    assert not hasattr(model, "model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_target_modules": r"language\.q_proj"}, "matches no linear layer of MiniCPM-V 2.6"),
        (
            {"lora_target_modules": r"llm\.(lm_head|.*q_proj)"},
            r"matches the output layer llm\.lm_head, .*train it in full with --lora_modules_to_save lm_head",
        ),
        ({"lora_target_modules": "llm.(q_proj"}, "not a regular expression"),
        ({"lora_layers_to_transform": [1, 7]}, r"layers \[7\], expected numbers from 0 to 1"),
        (
            {"lora_layers_to_transform": [1], "lora_layers_pattern": "blocks"},
            r"with layers \[1\] matches no linear layer",
        ),
        (
            {"lora_layer_replication": "[[0, 2], [1, 3]]"},
            r"expected ranges \[start, end\) within the 2 layers",
        ),
        ({"lora_layer_replication": "[[1, 1]]"}, r"expected ranges \[start, end\) within the 2 layers"),
        ({"lora_modules_to_save": ["resampla"]}, "the model has no module of that name"),
    ],
)
def test_what_matches_nothing_is_refused(options, message):
    model, _ = golden_model("v2_6")
    with pytest.raises(AdapterError, match=message):
        add_adapter(model, GENERATIONS["v2_6"], LoraArguments(**options), vision=False, resampler=True)


def test_an_adapter_continues_where_it_was_saved(tmp_path):
    model, _ = golden_model("v2_6")
    wrapped = add_adapter(
        model, GENERATIONS["v2_6"], LoraArguments(lora_r=4, lora_dropout=0.0), vision=True, resampler=True
    )
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    expected = {name: value for name, value in wrapped.named_parameters() if value.requires_grad}
    wrapped.save_pretrained(tmp_path)
    again, _ = golden_model("v2_6")
    found = load_adapter(again, read_adapter_folder(tmp_path), trainable=True)
    trained = {name: value for name, value in found.named_parameters() if value.requires_grad}
    assert trained.keys() == expected.keys()
    assert all(torch.equal(trained[name], expected[name]) for name in expected)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(AdapterError, match=r"found no adapter_config\.json"):
        read_adapter_folder(tmp_path)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    model, _ = golden_model("v4")
    add_adapter(model, GENERATIONS["v4"], LoraArguments(), vision=False, resampler=True).save_pretrained(
        tmp_path
    )
    other, _ = golden_model("v2_6")
    with pytest.raises(AdapterError, match="don't fit this model"):
        load_adapter(other, read_adapter_folder(tmp_path))


def test_the_untrained_copies_of_an_adapter_are_not_counted_twice():
    model, _ = golden_model("v2_6")
    before = count_parts(model, GENERATIONS["v2_6"])
    wrapped = build.add_adapter(model, GENERATIONS["v2_6"], LoraArguments(), vision=True, resampler=True)
    after = count_parts(wrapped, GENERATIONS["v2_6"])
    assert {part: count.total for part, count in after.items() if part != "lora"} == {
        part: count.total for part, count in before.items()
    }
    assert after["vision"].trainable == after["vision"].total
    assert after["llm"].trainable == 0


def switched_off(model, batch):
    with torch.no_grad(), model.disable_adapter():
        return model(**batch).loss.item()


def test_frozen_copies_of_trained_modules_are_no_part_of_the_model(tmp_path):
    model, about = golden_model("v2_6")
    batch, _ = full_batch("v2_6", "sliced", about)
    with torch.no_grad():
        before = model(**batch).loss.item()
    wrapped = add_adapter(
        model, GENERATIONS["v2_6"], LoraArguments(lora_r=4, lora_dropout=0.0), vision=True, resampler=True
    )
    held = sum(parameter.nbytes for parameter in wrapped.parameters())
    copies = sum(
        parameter.nbytes for name, parameter in wrapped.named_parameters() if ".original_module." in name
    )
    state = set(get_peft_model_state_dict(wrapped))
    set_frozen_copies_aside(wrapped)
    assert copies > 0
    assert sum(parameter.nbytes for parameter in wrapped.parameters()) == held - copies
    assert not [name for name in wrapped.state_dict() if "original_module" in name]
    assert set(get_peft_model_state_dict(wrapped)) == state

    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.03 * torch.randn_like(parameter))
        trained = wrapped(**batch).loss.item()
    assert trained != pytest.approx(before, rel=1e-4)
    assert switched_off(wrapped, batch) == before
    with torch.no_grad():
        assert wrapped(**batch).loss.item() == trained
    copied = copy.deepcopy(wrapped)
    assert switched_off(copied, batch) == before

    wrapped.save_pretrained(tmp_path / "adapter")
    fresh, _ = golden_model("v2_6")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    restore_output_layer(loaded)
    with torch.no_grad():
        assert loaded.train()(**batch).loss.item() == trained
        merged = wrapped.merge_and_unload()
        assert merged(**batch).loss.item() == pytest.approx(trained, rel=1e-5)


def test_a_further_adapter_starts_from_the_frozen_copies():
    model, _ = golden_model("v2_6")
    start = model.resampler.query.detach().clone()
    wrapped = add_adapter(model, GENERATIONS["v2_6"], LoraArguments(lora_r=4), vision=False, resampler=True)
    set_frozen_copies_aside(wrapped)
    torch.nn.init.zeros_(wrapped.base_model.model.resampler.query)
    wrapped.add_adapter("second", wrapped.peft_config["default"])
    assert torch.equal(wrapped.base_model.model.resampler.modules_to_save["second"].query, start)


def test_a_frozen_copy_comes_to_the_device_of_the_trained_module_while_it_is_used(monkeypatch):
    model, _ = golden_model("v2_6")
    lora = LoraArguments(lora_modules_to_save=["resampler"])
    wrapped = add_adapter(model, GENERATIONS["v2_6"], lora, vision=False, resampler=True)
    set_frozen_copies_aside(wrapped)
    wrapped.to("meta")
    original, moves = wrapped.base_model.model.resampler.original_module, []
    assert original.query.device.type == "cpu"
    monkeypatch.setattr(original, "to", lambda device: moves.append(str(device)))
    with wrapped.disable_adapter():
        assert moves == ["meta"]
    assert moves == ["meta", "cpu"]

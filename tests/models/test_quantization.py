"""Quantized weights: what is quantized, what stays exact, and that training on them works."""

import json
import logging
import re

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file

import quantize
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.models.parameter_parts import count_parts
from minicpm_tune.models.quantization import bytes_by_part, dequantize, quantized_modules
from support import minicpmv46_cases
from support.paths import GOLDENS
from support.quantized_cases import (
    LOSS_TOLERANCE,
    TRAINED_TENSORS,
    V2_6,
    golden_loss,
    gradients,
    load,
    save_golden,
    with_adapter,
)
from support.tiny_checkpoints import checkpoint as tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_golden("v2_6", tmp_path_factory.mktemp("full"))


@pytest.mark.parametrize("bits", [4, 8])
def test_exactly_the_layers_of_the_llm_are_quantized(checkpoint, bits):
    model = load(checkpoint, quant_bits=bits)
    found = quantized_modules(model)
    expected = {
        name
        for name, module in model.named_modules()
        if name.startswith("llm.model.layers.") and isinstance(module, torch.nn.Linear)
    }
    assert found.keys() == expected
    dtype, kind = {4: (torch.uint8, bnb.nn.Linear4bit), 8: (torch.int8, bnb.nn.Linear8bitLt)}[bits]
    assert all(type(module) is kind and module.weight.dtype == dtype for module in found.values())
    exact = load_file(checkpoint / "model.safetensors")
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in found:
            assert torch.equal(parameter, exact[name]), name


@pytest.mark.parametrize("bits", [4, 8])
def test_the_bytes_of_the_llm_shrink_as_the_bits_say(checkpoint, bits):
    full, small = (bytes_by_part(load(checkpoint, quant_bits=wanted), V2_6) for wanted in (None, bits))
    assert {**full, "llm": 0} == {**small, "llm": 0}
    head = 495 * 256 * 4  # the output layer's weight, exact
    layers = full["llm"] - head
    # Besides: scales, biases, norms; tables of 16 + 256 codes per layer, which weigh much in small ones.
    assert bits / 32 * layers < small["llm"] - head < bits / 32 * layers * 1.35


def test_counts_of_a_quantized_model_are_those_of_the_exact_one(checkpoint):
    exact, quantized = (count_parts(load(checkpoint, quant_bits=bits), V2_6) for bits in (None, 4))
    assert [count.total for count in quantized.values()] == [count.total for count in exact.values()]
    assert quantized["llm"].dtypes == ("uint8", "float32")


@pytest.mark.parametrize("bits", [4, 8])
def test_the_log_shows_memory_before_and_after(checkpoint, caplog, bits):
    with caplog.at_level(logging.INFO, logger="minicpm_tune"):
        load(checkpoint, quant_bits=bits)
    lines = [line.split() for line in caplog.text.splitlines()]
    rows = {
        line[0]: [float(value) for value in line[1:]]
        for line in lines
        if line[0] in ("vision", "llm", "total")
    }
    assert rows["vision"][0] == rows["vision"][1]
    assert rows["llm"][1] < rows["llm"][0] * 0.6
    assert rows["total"][0] - rows["total"][1] == pytest.approx(rows["llm"][0] - rows["llm"][1], abs=0.2)


@pytest.mark.parametrize(("generation", "bits"), [("v2", 4), ("v2_5", 8), ("v4", 8), ("v4_5", 4)])
def test_the_loss_of_a_quantized_model_is_near_the_exact_one(generation, bits, tmp_path):
    model = load(save_golden(generation, tmp_path), generation, quant_bits=bits)
    found, expected = golden_loss(model, generation)
    assert found.item() != expected
    assert found.item() == pytest.approx(expected, abs=LOSS_TOLERANCE[bits])


@pytest.mark.parametrize("bits", [4, 8])
def test_an_evaluation_between_steps_does_not_change_the_gradients(checkpoint, bits):
    model = with_adapter(load(checkpoint, quant_bits=bits))
    before = gradients(model)
    model.eval()
    with torch.no_grad():
        golden_loss(model)
    after = gradients(model.train())
    assert before.keys() == after.keys()
    assert len(before) == TRAINED_TENSORS
    for name, gradient in before.items():
        assert torch.equal(gradient, after[name]), name
        assert "lora" not in name or gradient.abs().max() > 0, name


def test_the_gradients_are_those_of_the_dequantized_model(checkpoint):
    quantized = with_adapter(load(checkpoint, quant_bits=4))
    ordinary = with_adapter(dequantize(load(checkpoint, quant_bits=4), torch.float32))
    expected = gradients(ordinary)
    for name, gradient in gradients(quantized).items():
        worst = (gradient - expected[name]).abs().max()
        assert worst <= 1e-4 * expected[name].abs().max() + 1e-7, name


def test_checkpointing_gives_the_same_gradients(checkpoint):
    model = with_adapter(load(checkpoint, quant_bits=4))
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-5, atol=1e-7), name


def test_vision_trains_beside_a_quantized_llm(checkpoint):
    found = gradients(with_adapter(load(checkpoint, quant_bits=4), vision=True))
    vision = [name for name in found if V2_6.part_of(name) == "vision"]
    assert len(vision) == sum(name.startswith("vpm.") for name in load_file(checkpoint / "model.safetensors"))
    assert sum(found[name].abs().max() > 0 for name in vision) > len(vision) // 2


def test_the_dequantized_model_computes_and_saves_as_an_ordinary_one(checkpoint, tmp_path):
    quantized = load(checkpoint, quant_bits=4)
    ordinary = dequantize(load(checkpoint, quant_bits=4), torch.float32)
    assert not quantized_modules(ordinary)
    assert golden_loss(ordinary)[0].item() == pytest.approx(golden_loss(quantized)[0].item(), abs=1e-5)
    ordinary.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        (checkpoint / "config.json").read_text()
    )
    assert (
        load_file(tmp_path / "model.safetensors").keys() == load_file(checkpoint / "model.safetensors").keys()
    )
    assert golden_loss(load(tmp_path))[0].item() == golden_loss(ordinary)[0].item()


@pytest.mark.parametrize("generation", ["v4_6", "v4_7"])
def test_generations_of_transformers_are_quantized_alike(generation, tmp_path):
    model = minicpmv46_cases.our_model(generation)
    model.config.name_or_path = str(GOLDENS / generation / "tokenizer")
    model.save_pretrained(tmp_path / "full")
    quantize.quantize_checkpoint(tmp_path / "full", tmp_path / "int4")
    loading, stored = load(tmp_path / "full", generation, quant_bits=4), load(tmp_path / "int4", generation)
    found = quantized_modules(stored)
    assert found.keys() == quantized_modules(loading).keys()
    assert {GENERATIONS[generation].part_of(f"{name}.weight") for name in found} == {"llm"}
    assert len(found) == 3 * (5 + 3) + 4 + 3  # three delta-net layers, one of full attention
    assert "lm_head" not in found
    ids = torch.arange(20, 60)[None]
    losses = [each(input_ids=ids, labels=ids).loss.item() for each in (model, loading, stored)]
    assert losses[1] == losses[2]
    assert losses[1] == pytest.approx(losses[0], abs=1)  # 0.44 of 14.1, of random weights
    assert sum(bytes_by_part(stored, GENERATIONS[generation]).values()) < sum(
        bytes_by_part(model, GENERATIONS[generation]).values()
    )


@pytest.mark.parametrize("generation", ["o2_6", "o4_5"])
def test_what_hears_and_what_speaks_stays_exact(generation):
    folder = tiny_checkpoint(generation)
    model = load(folder, generation, quant_bits=4)
    assert {GENERATIONS[generation].part_of(f"{name}.weight") for name in quantized_modules(model)} == {"llm"}
    stored = load_file(folder / "model.safetensors")
    exact = {name: value for name, value in model.named_parameters() if name.startswith(("apm.", "audio_"))}
    assert {GENERATIONS[generation].part_of(name) for name in exact} == {"audio", "resampler"}
    assert all(value.equal(stored[name]) for name, value in exact.items())


def test_the_experts_of_a_mixture_stay_exact(tmp_path):
    """bitsandbytes knows linear layers, and the experts of a layer are one tensor; docs/lora-and-qlora.md says so."""
    folder = tiny_checkpoint("v4_7_moe")
    quantize.quantize_checkpoint(folder, tmp_path / "int4")
    loading, stored = load(folder, "v4_7_moe", quant_bits=4), load(tmp_path / "int4", "v4_7_moe")
    for model in (loading, stored):
        names = quantized_modules(model)
        assert any(".shared_expert." in name for name in names)
        assert not any("shared_expert_gate" in name or ".experts" in name for name in names)
    exact = load(folder, "v4_7_moe")
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert stored.get_parameter(name).equal(exact.get_parameter(name))
    ids = torch.arange(20, 60)[None]
    losses = [each(input_ids=ids, labels=ids).loss.item() for each in (exact, loading, stored)]
    assert losses[1] == losses[2]
    assert losses[1] == pytest.approx(losses[0], abs=1)


def test_zero3_says_that_every_process_loads_the_whole_model(checkpoint, monkeypatch, caplog):
    monkeypatch.setattr("minicpm_tune.models.quantization.is_deepspeed_zero3_enabled", lambda: True)
    with caplog.at_level(logging.INFO, logger="minicpm_tune"):
        load(checkpoint, quant_bits=4)
    assert re.search(r"every process first loads the whole model \([\d.]+ MiB\)", caplog.text)

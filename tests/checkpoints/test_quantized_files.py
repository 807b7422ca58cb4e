"""Checkpoints whose files hold 4-bit weights, as the released int4 ones do."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from minicpm_tune.checkpoints.quantized_files import QuantizationError, check_training, stored_quantization
from minicpm_tune.models.minicpmv.configuration import MiniCPMVConfig
from minicpm_tune.models.minicpmv.modeling import MiniCPMV
from minicpm_tune.models.quantization import quantized_modules
from support.quantized_cases import (
    LOSS_TOLERANCE,
    TRAINED_TENSORS,
    V2_6,
    golden_loss,
    gradients,
    load,
    save_golden,
    save_released_int4,
    with_adapter,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_golden("v2_6", tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def int4_checkpoint(checkpoint, tmp_path_factory):
    return save_released_int4(checkpoint, tmp_path_factory.mktemp("int4"))


def test_what_is_quantized_is_read_from_the_checkpoint(int4_checkpoint):
    stored = stored_quantization(int4_checkpoint)
    assert stored.bits == 4
    assert "vpm.encoder.layers.0.mlp.fc1" in stored.modules
    assert "vpm.encoder.layers.0.self_attn.out_proj" not in stored.modules
    assert "resampler.kv_proj" not in stored.modules
    found = quantized_modules(load(int4_checkpoint))
    assert found.keys() == stored.modules
    assert all(module.compute_dtype == torch.float32 for module in found.values())


def test_a_missing_skip_list_does_not_matter(int4_checkpoint, tmp_path):
    folder = copy_of(int4_checkpoint, tmp_path, lambda settings: {**settings, "llm_int8_skip_modules": None})
    assert quantized_modules(load(folder)).keys() == stored_quantization(int4_checkpoint).modules


def test_a_layer_left_exact_among_quantized_ones_stays_exact(checkpoint, tmp_path):
    settings = BitsAndBytesConfig(
        load_in_4bit=True, llm_int8_skip_modules=["vpm", "resampler", "lm_head", "layers.1.mlp.up_proj"]
    )
    config = MiniCPMVConfig.from_pretrained(checkpoint)
    model = MiniCPMV.from_pretrained(checkpoint, config=config, quantization_config=settings)
    model.save_pretrained(tmp_path)
    found = quantized_modules(load(tmp_path))
    assert found.keys() == quantized_modules(model).keys()
    assert "llm.model.layers.0.mlp.up_proj" in found
    assert "llm.model.layers.1.mlp.up_proj" not in found


def test_exact_weights_have_the_dtype_of_the_run(int4_checkpoint):
    stored = load_file(int4_checkpoint / "model.safetensors")
    assert stored["llm.lm_head.weight"].dtype == torch.float16
    model = load(int4_checkpoint)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32, torch.uint8}


def test_its_loss_is_near_the_exact_one(int4_checkpoint):
    found, expected = golden_loss(load(int4_checkpoint))
    assert found.item() == pytest.approx(expected, abs=LOSS_TOLERANCE[4])


def test_adapters_train_on_it(int4_checkpoint):
    found = gradients(with_adapter(load(int4_checkpoint, quant_bits=4)))
    assert len(found) == TRAINED_TENSORS
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"quant_bits": None}, "stored in 4 bit, which can't be trained.*--q_lora true --quant_bits 4"),
        ({"quant_bits": 8}, "--quant_bits 8: the model is stored in 4 bit"),
        (
            {"vision": True},
            "--tune_vision true: 10 layers of that part are stored in 4 bit.*--tune_vision false",
        ),
    ],
)
def test_what_can_not_be_trained_says_why(int4_checkpoint, flags, message):
    wanted = {"quant_bits": 4, "vision": False, "resampler": True} | flags
    with pytest.raises(QuantizationError, match=message):
        check_training(stored_quantization(int4_checkpoint), V2_6, **wanted)


def test_other_bits_can_not_be_loaded(int4_checkpoint):
    with pytest.raises(QuantizationError, match="found weights stored in 4 bit, expected 8 bit"):
        load(int4_checkpoint, quant_bits=8)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_other_methods_are_refused_with_what_to_use(int4_checkpoint, tmp_path, method):
    folder = copy_of(int4_checkpoint, tmp_path, lambda _: {"quant_method": method, "bits": 4})
    with pytest.raises(
        QuantizationError, match=rf"\({method.upper()}\).*full-precision version.*--q_lora true"
    ):
        load(folder)


def test_the_early_gptq_file_is_recognized(checkpoint, tmp_path):
    shutil.copy(checkpoint / "config.json", tmp_path)
    (tmp_path / "quantize_config.json").write_text("{}")
    with pytest.raises(QuantizationError, match=r"\(GPTQ\)"):
        stored_quantization(tmp_path)


def test_settings_without_bits_are_refused(int4_checkpoint, tmp_path):
    folder = copy_of(int4_checkpoint, tmp_path, lambda _: {"quant_method": "bitsandbytes"})
    with pytest.raises(QuantizationError, match="neither load_in_4bit nor load_in_8bit"):
        stored_quantization(folder)


def test_a_quantized_resampler_can_not_be_trained(int4_checkpoint):
    stored = stored_quantization(int4_checkpoint)
    stored = type(stored)(4, stored.settings, frozenset({"resampler.kv_proj"}))
    with pytest.raises(QuantizationError, match="--tune_resampler true: 1 layers"):
        check_training(stored, V2_6, quant_bits=4, vision=False, resampler=True)


def copy_of(folder, target, change):
    """A copy of a checkpoint with other quantization settings."""
    target = target / "changed"
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = change(config["quantization_config"])
    (target / "config.json").write_text(json.dumps(config))
    return target

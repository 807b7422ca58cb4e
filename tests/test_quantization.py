"""Quantised weights: what is quantised, what stays exact, and that training on them works."""

import json
import logging
import shutil

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

import quantize
from adapters import add_adapter
from configuration_minicpmv import MiniCPMVConfig
from generations import GENERATIONS
from loading import load_model
from modeling_minicpmv import MiniCPMV
from options import LoraArguments
from parts import count_parts, part_of
from quantization import bytes_by_part, dequantize, quantized_modules
from quantized_checkpoints import QuantizationError, check_training, stored_quantization
from test_goldens_forward import GOLDENS, full_batch, golden_model

V2_6 = GENERATIONS["v2_6"]
# Modules that the released int4 checkpoints keep exact, by their config.json: vision is quantised there.
RELEASED_SKIP = ["out_proj", "kv_proj", "lm_head"]
# How far quantised weights move the loss of the random golden models; worst measured 0.1 of 6.5 and 0.01.
LOSS_TOLERANCE = {4: 0.2, 8: 0.03}
# q, k, v, o in two layers, A and B; resampler; token embeddings.
TRAINED_TENSORS = 2 * 8 + 13 + 1


def save_golden(generation, folder):
    """A small checkpoint in full precision, with a tokenizer."""
    model, _ = golden_model(generation, attention="sdpa")
    model.config.name_or_path = str(GOLDENS / generation / "tokenizer")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_golden("v2_6", tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def int4_checkpoint(checkpoint, tmp_path_factory):
    """As the released int4 files are: vision quantised too, with the settings of the official script."""
    folder = tmp_path_factory.mktemp("int4")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
        llm_int8_skip_modules=RELEASED_SKIP,
    )
    config = MiniCPMVConfig.from_folder(checkpoint)
    model = MiniCPMV.from_pretrained(
        checkpoint, config=config, dtype=torch.float16, quantization_config=settings
    )
    model.save_pretrained(folder)
    return folder


def load(folder, generation="v2_6", **kwargs):
    return load_model(folder, GENERATIONS[generation], dtype=torch.float32, **kwargs).train()


def golden_loss(model, generation="v2_6", case="single"):
    about = json.loads((GOLDENS / generation / "forward.json").read_text())
    batch, info = full_batch(generation, case, about)
    return model(**batch).loss, info["loss"]


def with_adapter(model, *, vision=False, **options):
    lora = LoraArguments(lora_r=4, lora_alpha=4, lora_dropout=0.0, **options)
    model = add_adapter(model, V2_6, lora, vision=vision, resampler=True)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # B is zero at first, which would hide A's gradients
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def gradients(model):
    model.zero_grad()
    golden_loss(model)[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bits", [4, 8])
def test_exactly_the_layers_of_the_llm_are_quantised(checkpoint, bits):
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


def test_counts_of_a_quantised_model_are_those_of_the_exact_one(checkpoint):
    exact, quantised = (count_parts(load(checkpoint, quant_bits=bits), V2_6) for bits in (None, 4))
    assert [count.total for count in quantised.values()] == [count.total for count in exact.values()]
    assert quantised["llm"].dtypes == ("uint8", "float32")


@pytest.mark.parametrize("bits", [4, 8])
def test_the_log_shows_memory_before_and_after(checkpoint, caplog, bits):
    with caplog.at_level(logging.INFO, logger="quantization"):
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
def test_the_loss_of_a_quantised_model_is_near_the_exact_one(generation, bits, tmp_path):
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


def test_the_gradients_are_those_of_the_dequantised_model(checkpoint):
    quantised = with_adapter(load(checkpoint, quant_bits=4))
    ordinary = with_adapter(dequantize(load(checkpoint, quant_bits=4), torch.float32))
    expected = gradients(ordinary)
    for name, gradient in gradients(quantised).items():
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


def test_vision_trains_beside_a_quantised_llm(checkpoint):
    found = gradients(with_adapter(load(checkpoint, quant_bits=4), vision=True))
    vision = [name for name in found if part_of(name, V2_6) == "vision"]
    assert len(vision) == sum(name.startswith("vpm.") for name in load_file(checkpoint / "model.safetensors"))
    assert sum(found[name].abs().max() > 0 for name in vision) > len(vision) // 2


def test_the_dequantised_model_computes_and_saves_as_an_ordinary_one(checkpoint, tmp_path):
    quantised = load(checkpoint, quant_bits=4)
    ordinary = dequantize(load(checkpoint, quant_bits=4), torch.float32)
    assert not quantized_modules(ordinary)
    assert golden_loss(ordinary)[0].item() == pytest.approx(golden_loss(quantised)[0].item(), abs=1e-5)
    ordinary.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        (checkpoint / "config.json").read_text()
    )
    assert (
        load_file(tmp_path / "model.safetensors").keys() == load_file(checkpoint / "model.safetensors").keys()
    )
    assert golden_loss(load(tmp_path))[0].item() == golden_loss(ordinary)[0].item()


class TestStoredQuantised:
    """A checkpoint whose files hold 4-bit weights, as the released int4 ones."""

    def test_what_is_quantised_is_read_from_the_checkpoint(self, int4_checkpoint):
        stored = stored_quantization(int4_checkpoint)
        assert stored.bits == 4
        assert "vpm.encoder.layers.0.mlp.fc1" in stored.modules
        assert "vpm.encoder.layers.0.self_attn.out_proj" not in stored.modules
        assert "resampler.kv_proj" not in stored.modules
        found = quantized_modules(load(int4_checkpoint))
        assert found.keys() == stored.modules
        assert all(module.compute_dtype == torch.float32 for module in found.values())

    def test_a_missing_skip_list_does_not_matter(self, int4_checkpoint, tmp_path):
        folder = copy_of(
            int4_checkpoint, tmp_path, lambda settings: {**settings, "llm_int8_skip_modules": None}
        )
        assert quantized_modules(load(folder)).keys() == stored_quantization(int4_checkpoint).modules

    def test_a_layer_left_exact_among_quantised_ones_stays_exact(self, checkpoint, tmp_path):
        settings = BitsAndBytesConfig(
            load_in_4bit=True, llm_int8_skip_modules=["vpm", "resampler", "lm_head", "layers.1.mlp.up_proj"]
        )
        config = MiniCPMVConfig.from_folder(checkpoint)
        model = MiniCPMV.from_pretrained(checkpoint, config=config, quantization_config=settings)
        model.save_pretrained(tmp_path)
        found = quantized_modules(load(tmp_path))
        assert found.keys() == quantized_modules(model).keys()
        assert "llm.model.layers.0.mlp.up_proj" in found
        assert "llm.model.layers.1.mlp.up_proj" not in found

    def test_exact_weights_have_the_dtype_of_the_run(self, int4_checkpoint):
        stored = load_file(int4_checkpoint / "model.safetensors")
        assert stored["llm.lm_head.weight"].dtype == torch.float16
        model = load(int4_checkpoint)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32, torch.uint8}

    def test_its_loss_is_near_the_exact_one(self, int4_checkpoint):
        found, expected = golden_loss(load(int4_checkpoint))
        assert found.item() == pytest.approx(expected, abs=LOSS_TOLERANCE[4])

    def test_adapters_train_on_it(self, int4_checkpoint):
        found = gradients(with_adapter(load(int4_checkpoint, quant_bits=4)))
        assert len(found) == TRAINED_TENSORS
        assert all(torch.isfinite(gradient).all() for gradient in found.values())

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (
                {"quant_bits": None},
                "stored in 4 bit, and such weights can't be trained.*--q_lora true --quant_bits 4",
            ),
            ({"quant_bits": 8}, "--quant_bits 8: this checkpoint is stored in 4 bit"),
            (
                {"vision": True},
                "--tune_vision true: 10 layers of that part are stored in 4 bit.*--tune_vision false",
            ),
        ],
    )
    def test_what_can_not_be_trained_says_why(self, int4_checkpoint, flags, message):
        wanted = {"quant_bits": 4, "vision": False, "resampler": True} | flags
        with pytest.raises(QuantizationError, match=message):
            check_training(stored_quantization(int4_checkpoint), V2_6, **wanted)

    def test_other_bits_can_not_be_loaded(self, int4_checkpoint):
        with pytest.raises(QuantizationError, match="found weights stored in 4 bit, expected 8 bit"):
            load(int4_checkpoint, quant_bits=8)

    @pytest.mark.parametrize("method", ["gptq", "awq"])
    def test_other_methods_are_refused_with_what_to_use(self, int4_checkpoint, tmp_path, method):
        folder = copy_of(int4_checkpoint, tmp_path, lambda _: {"quant_method": method, "bits": 4})
        with pytest.raises(
            QuantizationError, match=rf"\({method.upper()}\).*full-precision checkpoint.*--q_lora true"
        ):
            load(folder)

    def test_the_early_gptq_file_is_recognised(self, checkpoint, tmp_path):
        shutil.copy(checkpoint / "config.json", tmp_path)
        (tmp_path / "quantize_config.json").write_text("{}")
        with pytest.raises(QuantizationError, match=r"\(GPTQ\)"):
            stored_quantization(tmp_path)

    def test_settings_without_bits_are_refused(self, int4_checkpoint, tmp_path):
        folder = copy_of(int4_checkpoint, tmp_path, lambda _: {"quant_method": "bitsandbytes"})
        with pytest.raises(QuantizationError, match="neither load_in_4bit nor load_in_8bit"):
            stored_quantization(folder)


class TestQuantizeCommand:
    """finetune/quantize.py."""

    @pytest.fixture(scope="class")
    def written(self, tmp_path_factory):
        """o-2.6, whose speech parts are in the files and not in the model."""
        folder = tmp_path_factory.mktemp("quantize")
        source = save_golden("o2_6", folder / "source")
        tensors = load_file(source / "model.safetensors")
        tensors["apm.conv1.weight"] = torch.arange(12.0).reshape(3, 4)
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        (source / "modeling_minicpmo.py").write_text("# the released class\n")
        arguments = ["--model_name_or_path", str(source), "--output_dir", str(folder / "int4")]
        assert quantize.main(arguments) == 0
        return source, folder / "int4"

    def test_it_writes_the_released_form(self, written):
        source, output = written
        config = json.loads((output / "config.json").read_text())
        settings = config.pop("quantization_config")
        assert config == json.loads((source / "config.json").read_text())
        assert settings["quant_method"] == "bitsandbytes"
        assert settings["load_in_4bit"] is True
        assert settings["bnb_4bit_quant_type"] == "nf4"
        assert settings["bnb_4bit_use_double_quant"] is True
        assert settings["llm_int8_skip_modules"] == ["apm", "resampler", "vpm", "lm_head"]
        assert {path.name for path in source.iterdir()} <= {path.name for path in output.iterdir()}

    def test_exact_tensors_are_copied_and_the_others_shrink(self, written):
        before, after = (load_file(folder / "model.safetensors") for folder in written)
        for name, tensor in before.items():
            if ".layers." in name and name.startswith("llm.") and name.endswith("proj.weight"):
                assert after[name].dtype == torch.uint8
                assert after[name].numel() == tensor.numel() // 2
            else:
                assert torch.equal(after[name], tensor), name

    def test_it_loads_as_the_model_quantised_while_loading(self, written):
        source, output = written
        found = golden_loss(load(output, "o2_6"), "o2_6")[0]
        assert found == golden_loss(load(source, "o2_6", quant_bits=4), "o2_6")[0]
        check_training(
            stored_quantization(output), GENERATIONS["o2_6"], quant_bits=4, vision=True, resampler=True
        )

    def test_a_quantised_checkpoint_is_refused(self, written, tmp_path):
        with pytest.raises(QuantizationError, match="quantised already, expected full precision"):
            quantize.quantize_checkpoint(written[1], tmp_path)

    def test_a_folder_with_a_model_is_left_alone(self, written, capsys):
        source, output = written
        arguments = ["--model_name_or_path", str(source), "--output_dir", str(output)]
        assert quantize.main(arguments) == 1
        assert "it holds a model already" in capsys.readouterr().err


def test_a_quantised_resampler_can_not_be_trained(int4_checkpoint):
    stored = stored_quantization(int4_checkpoint)
    stored = type(stored)(4, stored.settings, frozenset({"resampler.kv_proj"}))
    with pytest.raises(QuantizationError, match="--tune_resampler true: 1 layers"):
        check_training(stored, V2_6, quant_bits=4, vision=False, resampler=True)


def copy_of(folder, target, change):
    """A copy of a checkpoint with other quantisation settings."""
    target = target / "changed"
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = change(config["quantization_config"])
    (target / "config.json").write_text(json.dumps(config))
    return target

"""quantize.py, and finetune.py with --q_lora true, as commands."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantize
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.checkpoints.quantized_files import QuantizationError, check_training, stored_quantization
from minicpm_tune.files import OutputError
from support import finetune_runs
from support.paths import GOLDENS
from support.quantized_cases import golden_loss, load, save_golden, save_released_int4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_golden("v2_6", tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def int4_checkpoint(checkpoint, tmp_path_factory):
    return save_released_int4(checkpoint, tmp_path_factory.mktemp("int4"))


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
        quantize.run(quantize.parse_flags(arguments))
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
        exact = ["apm", "audio_projection_layer", "resampler", "vpm", "lm_head"]
        assert settings["llm_int8_skip_modules"] == exact
        assert {path.name for path in source.iterdir()} <= {path.name for path in output.iterdir()}

    def test_exact_tensors_are_copied_and_the_others_shrink(self, written):
        before, after = (load_file(folder / "model.safetensors") for folder in written)
        for name, tensor in before.items():
            if ".layers." in name and name.startswith("llm.") and name.endswith("proj.weight"):
                assert after[name].dtype == torch.uint8
                assert after[name].numel() == tensor.numel() // 2
            else:
                assert torch.equal(after[name], tensor), name

    def test_it_loads_as_the_model_quantized_while_loading(self, written):
        source, output = written
        found = golden_loss(load(output, "o2_6"), "o2_6")[0]
        assert found == golden_loss(load(source, "o2_6", quant_bits=4), "o2_6")[0]
        check_training(
            stored_quantization(output), GENERATIONS["o2_6"], quant_bits=4, vision=True, resampler=True
        )

    def test_a_quantized_checkpoint_is_refused(self, written, tmp_path):
        with pytest.raises(QuantizationError, match="found quantized weights, expected full precision"):
            quantize.quantize_checkpoint(written[1], tmp_path)

    def test_a_folder_with_a_model_is_left_alone(self, written):
        source, output = written
        with pytest.raises(OutputError, match="the folder exists and is not empty"):
            quantize.quantize_checkpoint(source, output)


class TestRuns:
    """finetune.py --q_lora true."""

    LORA = ("--use_lora", "true", "--tune_llm", "false", "--lora_dropout", 0, "--q_lora", "true")

    @pytest.fixture(scope="class")
    def data(self, tmp_path_factory):
        return finetune_runs.write_data(tmp_path_factory.mktemp("data"))

    @pytest.fixture(scope="class")
    def expected(self, checkpoint, data, tmp_path_factory):
        """One process, no evaluation between the steps."""
        folder = tmp_path_factory.mktemp("one")
        flags = (*self.LORA, *self.evaluation(data, steps=100))
        return finetune_runs.train(folder, *flags, model=checkpoint, data=data, launcher=False)

    @staticmethod
    def evaluation(data, *, steps):
        return "--eval_data_path", data, "--eval_strategy", "steps", "--eval_steps", steps

    @pytest.mark.parametrize("stage", [3, pytest.param(2, marks=pytest.mark.slow)])
    def test_two_processes_with_evaluations_give_the_run_of_one(
        self, checkpoint, data, expected, tmp_path, stage
    ):
        flags = ("--deepspeed", f"ds_config_zero{stage}.json", *self.LORA, *self.evaluation(data, steps=1))
        found = finetune_runs.train(tmp_path, *flags, model=checkpoint, data=data, processes=2, batch=2)
        for line, wanted in zip(found, expected, strict=True):
            assert line["loss"] == pytest.approx(wanted["loss"], rel=2e-5)  # 2e-6 (ZeRO-3)
            assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)  # 1e-5
        names = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
        assert not any("quant" in name or "absmax" in name for name in names)

    def test_a_stored_int4_checkpoint_without_q_lora_is_an_error_of_one_line(
        self, int4_checkpoint, data, tmp_path
    ):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(GOLDENS / "v2_6" / "tokenizer" / name, int4_checkpoint)
        finished = finetune_runs.run(
            ["--model_name_or_path", int4_checkpoint, "--data_path", data, "--output_dir", tmp_path / "out"],
            launcher=False,
        )
        assert finished.returncode == 1
        assert "error: --model_name_or_path: found MiniCPM-V 2.6 weights stored in 4 bit" in finished.stderr
        assert "Traceback" not in finished.stderr

"""Checkpointing per part, optimizers, and flags that can't act here."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from make_checkpoint import make_checkpoint
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.models.loading import load_model
from minicpm_tune.models.speed_options import SpeedOptionError, apply_liger, set_checkpointing
from minicpm_tune.settings.arguments import parse_arguments
from minicpm_tune.settings.checks import UsageError
from support import finetune_runs, processes
from support.golden_models import full_batch, golden_model
from support.paths import SUPPORT

GRADIENT_TOLERANCE = 1e-6  # 0: the same operations twice


def arguments(llm, vision):
    return SimpleNamespace(
        gradient_checkpointing=llm,
        activation_checkpointing=llm,
        activation_checkpointing_kwargs=None,
        vision_gradient_checkpointing=vision,
    )


def checkpointed_parts(model, row):
    vision = (*row.modules["vision"], *row.modules["resampler"])
    on = [name for name, module in model.named_modules() if getattr(module, "gradient_checkpointing", False)]
    return {"vision" if name.startswith(vision) else "llm" for name in on}


@pytest.mark.parametrize(
    ("llm", "vision", "expected"),
    [
        (True, None, {"llm", "vision"}),
        (True, False, {"llm"}),
        (False, True, {"vision"}),
        (False, None, set()),
    ],
)
@pytest.mark.parametrize("generation", ["v2", "v2_6", "v4_6"])
def test_checkpointing_is_on_for_the_parts_asked_for(tmp_path, generation, llm, vision, expected):
    row = GENERATIONS[generation]
    model = load_model(make_checkpoint(tmp_path, generation, size="tiny"), dtype=torch.float32)
    training = arguments(llm, vision)
    set_checkpointing(model, row, training)
    assert checkpointed_parts(model, row) == expected
    assert training.gradient_checkpointing is False


def test_every_second_layer_can_be_checkpointed_alone():
    model, _ = golden_model("v2_6")
    training = arguments(True, False)
    training.activation_checkpointing_kwargs = {"every_n_layers": 2}
    set_checkpointing(model, GENERATIONS["v2_6"], training)
    layers = [layer.gradient_checkpointing for layer in model.llm.model.layers]
    assert sorted(layers) == [False, True]


@pytest.mark.parametrize("generation", ["v2", "v2_5", "v4_5"])
def test_checkpointing_changes_no_gradient(generation):
    model, about = golden_model(generation, attention="sdpa")
    batch, _ = full_batch(generation, "sliced", about)

    def gradients():
        model.zero_grad()
        model(**batch).loss.backward()
        return {
            name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None
        }

    expected = gradients()
    set_checkpointing(model, GENERATIONS[generation], arguments(True, None))
    for name, gradient in gradients().items():
        assert (gradient - expected[name]).abs().max() < GRADIENT_TOLERANCE, name


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing on a machine without a GPU")
def test_liger_kernels_are_refused_where_they_cannot_run():
    model, _ = golden_model("v2_6")
    with pytest.raises(SpeedOptionError, match="needs a GPU"):
        apply_liger(model, SimpleNamespace(use_liger_kernel=True))


def test_compiling_is_refused_with_the_reason(tmp_path):
    data = finetune_runs.write_data(tmp_path / "data", rows=1)
    flags = [
        "--model_name_or_path",
        str(make_checkpoint(tmp_path / "m", "v2_6", size="tiny")),
        "--data_path",
        str(data),
    ]
    with pytest.raises(UsageError, match="every new shape would be compiled"):
        parse_arguments([*flags, "--output_dir", str(tmp_path / "out"), "--torch_compile", "true"])


@pytest.mark.slow
def test_every_optimizer_of_the_requirements_learns(tmp_path):
    model, data = (
        make_checkpoint(tmp_path / "m", "v2_6", size="tiny"),
        finetune_runs.write_data(tmp_path / "data", rows=4),
    )
    # Paged optimizers fall back to their plain form on the CPU.
    names = [
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "paged_adamw_8bit",
        "adafactor",
        "sgd",
        "lion_8bit",
    ]
    commands = [
        [
            "--model_name_or_path", str(model), "--data_path", str(data), "--output_dir", str(tmp_path / name),
            "--max_steps", "6", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--report_to", "none",
            "--save_strategy", "no", "--learning_rate", "1e-2" if name == "sgd" else "3e-4", "--optim", name,
            "--lr_scheduler_type", "constant",
        ]
        for name in names
    ]  # fmt: skip
    done = processes.run([sys.executable, SUPPORT / "several_runs.py", json.dumps(commands)], limit=250)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        lines = [line["loss"] for line in finetune_runs.losses(tmp_path / name)]
        assert all(math.isfinite(loss) for loss in lines)
        assert lines[-1] < lines[0], (name, lines)

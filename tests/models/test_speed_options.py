"""Checkpointing per part, optimizers, and flags that can't act here."""

import importlib.util
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from make_checkpoint import make_checkpoint
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.models import speed_options
from minicpm_tune.models.loading import load_model
from minicpm_tune.models.speed_options import (
    Checkpointing,
    SpeedOptionError,
    apply_liger,
    set_checkpointing,
    use_fast_kernels,
)
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


@pytest.mark.parametrize("generation", ["v2_6", "v4_5"])
def test_whatever_auto_chooses_the_loss_and_the_gradients_are_the_same(generation):
    row = GENERATIONS[generation]
    found = []
    for chosen in [(0, 0), (0, 2), (0, 1), (2, 1), (1, 1)]:
        model, about = golden_model(generation, attention="sdpa")
        set_checkpointing(model, row, arguments(False, None), Checkpointing(*chosen))
        batch, _ = full_batch(generation, "sliced", about)
        loss = model.train()(**batch).loss
        loss.backward()
        norms = {
            name: value.grad.norm().item()
            for name, value in model.named_parameters()
            if value.grad is not None
        }
        on = sum(bool(getattr(module, "gradient_checkpointing", False)) for module in model.modules())
        found.append((on, loss.item(), norms))
    layers, losses, gradients = zip(*found, strict=True)
    assert list(layers) == sorted(set(layers))  # each computes more again than the one before
    assert len(set(losses)) == 1
    assert all(one == gradients[0] for one in gradients)


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


@pytest.fixture
def liger(monkeypatch):
    """A machine with a GPU and liger; the models that got its kernels."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    patched = []
    monkeypatch.setattr(speed_options, "apply_liger", patched.append)
    return patched


@pytest.mark.parametrize(("flag", "used"), [(None, True), (True, True), (False, False)])
def test_liger_kernels_are_used_where_they_can_be_unless_switched_off(liger, caplog, flag, used):
    model, _ = golden_model("v2_6")
    training = SimpleNamespace(use_liger_kernel=flag)
    with caplog.at_level("INFO"):
        use_fast_kernels(model, training)
    assert liger == [model] * used
    assert training.use_liger_kernel is False  # Trainer must not look for them
    assert ("liger kernels: RMSNorm" if used else "liger kernels: off, as asked for") in caplog.text


def test_without_liger_a_gpu_is_told_what_to_install(liger, monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    model, _ = golden_model("v2_6")
    with caplog.at_level("INFO"):
        use_fast_kernels(model, SimpleNamespace(use_liger_kernel=None))
    assert not liger
    assert "liger kernels: needs the package, pip install liger-kernel" in caplog.text
    with pytest.raises(SpeedOptionError, match="pip install liger-kernel"):
        use_fast_kernels(model, SimpleNamespace(use_liger_kernel=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing on a machine without a GPU")
def test_liger_kernels_are_refused_without_a_gpu():
    model, _ = golden_model("v2_6")
    with pytest.raises(SpeedOptionError, match="needs a GPU"):
        use_fast_kernels(model, SimpleNamespace(use_liger_kernel=True))


# Loss, and gradient relative to its size, in fp32 with triton's interpreter. Worst measured: 4.7e-6.
LIGER_TOLERANCE = 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["v2", "v2_5", "v2_6", "v4_5", "v4_6", "xc2_vl_7b"])
def test_liger_kernels_give_the_losses_and_gradients_without(tmp_path, generation):
    pytest.importorskip("liger_kernel", reason="needs liger-kernel and triton, which runs without a GPU too")
    checkpoint = make_checkpoint(tmp_path, generation, size="tiny")
    worker = [sys.executable, SUPPORT / "liger_worker.py", checkpoint]
    environment = {**processes.environment(), "TRITON_INTERPRET": "1"}
    done = processes.run(worker, limit=500, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["modules"] > 4
    assert found["losses"][1] == pytest.approx(found["losses"][0], rel=LIGER_TOLERANCE)
    assert found["gradient"] < LIGER_TOLERANCE


@pytest.mark.gpu
def test_liger_kernels_give_the_losses_without_on_a_gpu():
    pytest.importorskip("liger_kernel")
    model, about = golden_model("v2_6", attention="sdpa", dtype=torch.bfloat16)
    model = model.cuda()
    batch, _ = full_batch("v2_6", "single", about)
    batch = {name: value.cuda() for name, value in batch.items()}
    expected = model(**batch).loss.item()
    apply_liger(model)
    assert model(**batch).loss.item() == pytest.approx(expected, rel=0.01)


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

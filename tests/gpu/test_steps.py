"""Steps on a GPU: models give the losses and gradients of the CPU without a wait, and runs of finetune.py train."""

import json
import math

import pytest
import torch

from finetune import run
from make_checkpoint import make_checkpoint
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.data.sample_tensors import data_collator
from minicpm_tune.data.samples import load_processing
from minicpm_tune.models.loading import load_model
from minicpm_tune.models.speed_options import apply_liger
from minicpm_tune.training.process_lifecycle import ProcessLifecycle
from support import finetune_runs
from support.training_samples import draw

pytestmark = pytest.mark.gpu

ONE_OF_A_FAMILY = ("v2_6", "v4_6", "xc2_vl_7b")
METHODS = {
    "lora": ["--use_lora", "true", "--tune_llm", "false"],
    "qlora": ["--use_lora", "true", "--tune_llm", "false", "--q_lora", "true", "--tune_vision", "false"],
    "full": ["--tune_vision", "false", "--optim", "adamw_8bit"],
}


def moved(batch, device):
    """The batch as the trainer gives it to the model: tensors on the device, numpy arrays where they are."""
    found = {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name != "provenance"
    }
    return {**found, "num_items_in_batch": torch.tensor(5, device=device)}


def made_batch(folder, *, packing):
    samples = draw(load_processing(folder))
    return data_collator([samples] if packing else samples, packing=packing)


def outcome(model, batch):
    """Loss and gradient norm of a step."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    norms = [value.grad.float().norm() for value in model.parameters() if value.grad is not None]
    return loss.item(), torch.stack(norms).norm().item()


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", GENERATIONS)
def test_a_step_gives_what_the_cpu_gives(tmp_path, gpu, name, packing):
    folder = make_checkpoint(tmp_path, name, size="tiny")
    model = load_model(folder, dtype=torch.float32).eval()  # without dropout
    batch = made_batch(folder, packing=packing)
    expected = outcome(model, moved(batch, "cpu"))
    model.to(gpu)
    assert outcome(model, moved(batch, gpu)) == pytest.approx(expected, rel=1e-3)
    loss, norm = outcome(model.bfloat16(), moved(batch, gpu))
    assert loss == pytest.approx(expected[0], rel=0.02)
    assert norm == pytest.approx(expected[1], rel=0.15)  # 0.068 on a CPU, V-4.6


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", GENERATIONS)
def test_a_step_never_waits(tmp_path, gpu, name, packing):
    folder = make_checkpoint(tmp_path, name, size="tiny")
    model = load_model(folder, dtype=torch.bfloat16).to(gpu).train()
    batch = moved(made_batch(folder, packing=packing), gpu)
    model(**batch).loss.backward()  # compiles and allocates
    if gpu == "cpu":
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["v2_5", "v2_6", "v4", "v4_5"])
def test_liger_kernels_give_what_transformers_gives(tmp_path, gpu, name):
    pytest.importorskip("liger_kernel")
    if gpu == "cpu":
        pytest.skip("liger's kernels need a GPU")
    folder = make_checkpoint(tmp_path, name, size="tiny")
    model = load_model(folder, dtype=torch.bfloat16).to(gpu).train()
    batch = moved(made_batch(folder, packing=True), gpu)
    expected = outcome(model, batch)
    apply_liger(model)
    assert outcome(model, batch) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", ["v2_6", "v4_5"])
def test_flash_attention_gives_what_sdpa_gives(tmp_path, gpu, name):
    pytest.importorskip("flash_attn")
    folder = make_checkpoint(tmp_path, name, size="tiny")
    found = []
    for attention in ("sdpa", "flash_attention_2"):
        model = load_model(folder, dtype=torch.bfloat16, attention=attention).to(gpu).train()
        found.append(outcome(model, moved(made_batch(folder, packing=True), gpu)))
    assert found[1] == pytest.approx(found[0], rel=0.03)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return finetune_runs.write_data(tmp_path_factory.mktemp("rows"), rows=8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ONE_OF_A_FAMILY)
def test_a_run_trains_as_on_the_cpu(tmp_path, gpu, rows, name, method):
    model = make_checkpoint(tmp_path / "model", name, size="tiny")
    found = []
    for device in (gpu, "cpu"):
        output = tmp_path / device
        words = [
            "--model_name_or_path", model, "--data_path", rows, "--output_dir", output, "--max_steps", 2,
            "--per_device_train_batch_size", 4, "--learning_rate", "1e-3", "--lr_scheduler_type", "constant",
            "--logging_steps", 1, "--report_to", "none", "--seed", 7, "--lora_dropout", 0,
            "--bf16", str(device == "cuda").lower(), "--use_cpu", str(device == "cpu").lower(),
            "--dataloader_num_workers", 0, "--overwrite_output_dir", "true", *METHODS[method],
        ]  # fmt: skip
        process = ProcessLifecycle()
        with process.user_errors_as_messages():
            run([str(word) for word in words], process)
        assert process.exit_code == 0
        found.append(finetune_runs.losses(output))
    for there, here in zip(*found, strict=True):
        assert math.isfinite(there["grad_norm"])
        assert there["loss"] == pytest.approx(here["loss"], rel=0.05), json.dumps(found)

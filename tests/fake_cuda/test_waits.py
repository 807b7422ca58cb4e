"""Nothing in a step waits for the device: what the host must know, it knows before the batch is moved."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from make_checkpoint import make_checkpoint
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.data.collating import data_collator
from minicpm_tune.data.samples import load_processing
from minicpm_tune.models.loading import load_model
from minicpm_tune.models.speed_options import apply_liger
from minicpm_tune.planning.step_memory import build_on_meta
from support.golden_models import SIX, full_batch, golden_model
from support.training_samples import draw

HOST_ONLY = ("provenance",)


def moved(batch, device):
    """The batch as the trainer gives it to the model: tensors on the device, numpy arrays where they are."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name not in HOST_ONLY
    }


def made_batch(folder, name, *, packing):
    samples = draw(load_processing(folder))
    rows = [samples] if packing else samples
    return data_collator(rows, packing=packing)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", GENERATIONS)
def test_a_step_runs_where_no_value_can_be_read_back(tmp_path, name, packing, monkeypatch):
    """On torch's meta device tensors have no values: reading one, or a shape that depends on one, raises."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none on that device
    folder = make_checkpoint(tmp_path, name, size="tiny")
    model = build_on_meta(folder, GENERATIONS[name]).train()
    batch = moved(made_batch(folder, name, packing=packing), "meta")
    batch["num_items_in_batch"] = torch.empty((), dtype=torch.int64, device="meta")
    model(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_reading_a_value_back_on_the_meta_device_raises():
    with pytest.raises(RuntimeError, match="meta"):
        torch.empty((), device="meta").item()


@pytest.mark.gpu
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", SIX)
def test_a_step_on_a_gpu_never_waits_for_it(tmp_path, name, packing):
    folder = make_checkpoint(tmp_path, name, size="tiny")
    model = load_model(folder, dtype=torch.bfloat16).cuda().train()
    batch = moved(made_batch(folder, name, packing=packing), "cuda")
    batch["num_items_in_batch"] = torch.ones((), dtype=torch.int64, device="cuda")
    model(**batch).loss.backward()  # compiles and allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["v2", "v2_5", "v2_6", "v4", "v4_5"])
def test_liger_kernels_give_the_gradients_without(name):
    model, about = golden_model(name, attention="sdpa", dtype=torch.bfloat16)
    batch = moved(full_batch(name, "single", about)[0], "cuda")
    model = model.cuda()

    def step():
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        norms = {
            key: value.grad.float().norm()
            for key, value in model.named_parameters()
            if value.grad is not None
        }
        return loss.item(), torch.stack(list(norms.values())).norm().item()

    expected = step()
    apply_liger(model, SimpleNamespace(use_liger_kernel=True))
    assert step() == pytest.approx(expected, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SIX)
def test_packed_rows_under_flash_attention_equal_sdpa(tmp_path, name):
    pytest.importorskip("flash_attn")
    folder = make_checkpoint(tmp_path, name, size="tiny")
    found = []
    for attention in ("sdpa", "flash_attention_2"):
        model = load_model(folder, dtype=torch.bfloat16, attention=attention).cuda().train()
        loss = model(**moved(made_batch(folder, name, packing=True), "cuda")).loss
        loss.backward()
        found.append((loss.item(), model.get_input_embeddings().weight.grad.float().norm().item()))
    assert found[1] == pytest.approx(found[0], rel=0.03)


@pytest.mark.gpu
def test_variable_length_attention_equals_attention_slice_by_slice():
    from minicpm_tune.models.attention import attend_within_slices

    torch.manual_seed(0)
    lengths, heads, width = [5, 5, 64, 1024, 1024], 16, 72
    parts = [torch.randn(sum(lengths), heads, width, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    for part in parts:
        part.requires_grad_()
    found = attend_within_slices(*parts, lengths=lengths)
    found.float().square().sum().backward()
    gradients = [part.grad.clone() for part in parts]
    exact = [part.detach().double().requires_grad_() for part in parts]
    expected = attend_within_slices(*exact, lengths=lengths)
    expected.square().sum().backward()
    assert (found - expected).abs().max() < 0.02
    for gradient, part in zip(gradients, exact, strict=True):
        assert (gradient - part.grad).abs().max() / part.grad.abs().max() < 0.02

"""Nothing in a step waits for the device: what the host must know, it knows before the batch is moved."""

from contextlib import nullcontext

import pytest
import torch

from make_checkpoint import make_checkpoint
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.data.sample_tensors import data_collator
from minicpm_tune.data.samples import load_processing
from minicpm_tune.planning.step_memory import build_on_meta
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
    if GENERATIONS[
        name
    ].expert_parameters:  # the product of experts and their tokens has no other dtype there
        model = model.to(torch.bfloat16)
    batch = moved(made_batch(folder, name, packing=packing), "meta")
    batch["num_items_in_batch"] = torch.empty((), dtype=torch.int64, device="meta")
    model(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_reading_a_value_back_on_the_meta_device_raises():
    with pytest.raises(RuntimeError, match="meta"):
        torch.empty((), device="meta").item()

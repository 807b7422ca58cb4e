"""Checkpointing per part, and flags that can't act here."""

from types import SimpleNamespace

import pytest
import torch

from generations import GENERATIONS
from loading import load_model
from make_checkpoint import make_checkpoint
from speed_options import SpeedOptionError, apply_liger, set_checkpointing
from test_goldens_forward import full_batch, golden_model

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
    model = load_model(make_checkpoint(tmp_path, generation, size="tiny"), row, dtype=torch.float32)
    training = arguments(llm, vision)
    set_checkpointing(model, row, training)
    assert checkpointed_parts(model, row) == expected
    assert training.gradient_checkpointing is False


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


@pytest.mark.gpu
def test_liger_kernels_give_the_losses_without():
    model, about = golden_model("v2_6", attention="sdpa", dtype=torch.bfloat16)
    model = model.cuda()
    batch, _ = full_batch("v2_6", "single", about)
    batch = {name: value.cuda() for name, value in batch.items()}
    expected = model(**batch).loss.item()
    apply_liger(model, SimpleNamespace(use_liger_kernel=True))
    assert model(**batch).loss.item() == pytest.approx(expected, rel=0.01)

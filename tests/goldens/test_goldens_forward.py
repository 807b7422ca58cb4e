"""The model against outputs of the released code: features, logits, loss and every gradient norm.

Run with ``-s`` for a table of generation x case x worst error.
"""

import json

import numpy as np
import pytest
import torch

from minicpm_tune.models.batch_layout import VisionInput
from support.golden_models import HEARING, SIX, ZERO_GRADIENTS, full_batch, golden_model
from support.paths import GOLDENS

CASES = [
    (generation, case)
    for generation in (*SIX, *HEARING)
    for case in json.loads((GOLDENS / generation / "forward.json").read_text())["cases"]
]

# Worst values measured on torch 2.13 (CPU, 2 cores) stand behind each.
LOSS_TOLERANCE = 5e-6  # 1.4e-6 (o2_6 sliced, v4 batch)
LOGIT_TOLERANCE = 3e-5  # 7.4e-6 (v4 batch)
FEATURE_TOLERANCE = 3e-5  # 6.7e-6 (v2_6 sliced)
GRADIENT_TOLERANCE = 1e-5  # 1.2e-6, relative (v2 single, resampler.ln_q.bias)


def logit_error(generation, case, logits):
    arrays = np.load(GOLDENS / generation / "forward.npz")
    return max(
        np.abs(
            row.detach().numpy()[arrays[f"{case}.{i}.logit_positions"]] - arrays[f"{case}.{i}.logits"]
        ).max()
        for i, row in enumerate(logits)
    )


def feature_error(model, generation, case, batch):
    arrays = np.load(GOLDENS / generation / "forward.npz")
    expected = [
        arrays[name] for name in sorted(arrays.files) if name.startswith(f"{case}.") and "features" in name
    ]
    if not expected:
        return 0.0
    keys = ("pixel_values", "tgt_sizes", "image_bound", "temporal_ids")
    seen = VisionInput(**{key: batch[key] for key in keys if key in batch})
    embeddings, _ = model.embed(batch["input_ids"], seen, position_ids=batch.get("position_ids"))
    found = torch.stack([embeddings[row, start:end] for row, start, end in batch["image_bound"].tolist()])
    return np.abs(found.detach().numpy() - np.concatenate(expected)).max()


@pytest.mark.parametrize(("generation", "case"), CASES)
def test_forward_equals_the_released_code(generation, case):
    model, about = golden_model(generation)
    batch, info = full_batch(generation, case, about)
    output = model(**batch)
    output.loss.backward()
    labels = batch.pop("labels")
    logits = model(**batch).logits
    gradients = {
        # Without an image or a sound the norm of what would have seen or heard it is 0, not missing.
        name: abs(parameter.grad.norm().item() - info["grad_norms"][name]) / (info["grad_norms"][name] or 1)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ZERO_GRADIENTS not in name
    }
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen - {"resampler.pos_embed"} == set(about.get("frozen", ()))
    worst = max(gradients, key=gradients.get)
    errors = {
        "loss": abs(output.loss.item() - info["loss"]),
        "logits": logit_error(generation, case, logits),
        "features": feature_error(model, generation, case, batch),
        "gradients": gradients[worst],
    }
    print(
        f"\n{generation:5} {case:12}",
        "  ".join(f"{name} {error:.1e}" for name, error in errors.items()),
        worst,
    )
    assert output.token_count == (labels[:, 1:] != -100).sum()
    assert errors["loss"] < LOSS_TOLERANCE
    assert errors["logits"] < LOGIT_TOLERANCE
    assert errors["features"] < FEATURE_TOLERANCE
    assert errors["gradients"] < GRADIENT_TOLERANCE, worst


@pytest.mark.parametrize("generation", [*SIX, *HEARING])
def test_parameter_names_and_shapes_are_the_released_ones(generation):
    model, about = golden_model(generation)
    expected = {name: tuple(shape) for name, shape in about["parameters"]}
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found.pop("resampler.pos_embed", None)
    expected.pop("resampler.pos_embed", None)
    assert found == expected


# Measured against the reference's eager attention; bf16 keeps 8 bits of mantissa.
SDPA_LOGIT_TOLERANCE = 3e-5  # 7.4e-6
BF16_LOSS_TOLERANCE = 0.01  # 0.0016, relative (v4 single)


@pytest.mark.parametrize("generation", SIX)
def test_sdpa_attention_gives_the_same_logits(generation):
    model, about = golden_model(generation, attention="sdpa")
    for case in about["cases"]:
        batch, _ = full_batch(generation, case, about)
        del batch["labels"]
        assert logit_error(generation, case, model(**batch).logits) < SDPA_LOGIT_TOLERANCE


@pytest.mark.parametrize("generation", SIX)
def test_bf16_is_near(generation):
    model, about = golden_model(generation, attention="sdpa", dtype=torch.bfloat16)
    for case, info in about["cases"].items():
        batch, _ = full_batch(generation, case, about)
        output = model(**batch)
        output.loss.backward()
        print(f"\n{generation} {case}: bf16 loss off by {abs(output.loss.item() / info['loss'] - 1):.1e}")
        assert output.loss.item() == pytest.approx(info["loss"], rel=BF16_LOSS_TOLERANCE)
        assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)

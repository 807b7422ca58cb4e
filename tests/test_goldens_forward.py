"""The model against outputs of the released code: features, logits, loss and every gradient norm.

Run with ``-s`` for a table of generation x case x worst error.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from configuration_minicpmv import MiniCPMVConfig
from modeling_minicpmv import MiniCPMV

GOLDENS = Path(__file__).parent / "goldens"
SIX = ("v2", "v2_5", "v2_6", "o2_6", "v4", "v4_5")
CASES = [
    (generation, case)
    for generation in SIX
    for case in json.loads((GOLDENS / generation / "forward.json").read_text())["cases"]
]

# Worst values measured on torch 2.13 (CPU, 2 cores) stand behind each.
LOSS_TOLERANCE = 5e-6  # 1.4e-6 (o2_6 sliced, v4 batch)
LOGIT_TOLERANCE = 3e-5  # 7.4e-6 (v4 batch)
FEATURE_TOLERANCE = 3e-5  # 6.7e-6 (v2_6 sliced)
GRADIENT_TOLERANCE = 1e-5  # 1.2e-6, relative (v2 single, resampler.ln_q.bias)
# A key's bias moves every score of a query alike, so its gradient is 0 and what is left is noise.
ZERO_GRADIENTS = "k_proj.bias"


def golden_weight(name, shape, *, seed, v2):
    """The rule by which the reference run filled its parameters."""
    state = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    values = state.standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        return 1 + 0.1 * values if name.endswith("weight") else 0.05 * values
    if "embed_tokens" in name or "position_embedding" in name or name.endswith(("pos_embed", ".query")):
        return (0.05 if v2 and "embed_tokens" in name else 0.3) * values
    return values * (1.2 / np.sqrt(np.prod(shape[1:])))


def golden_model(generation, *, attention="eager", dtype=torch.float32):
    config = MiniCPMVConfig.from_folder(GOLDENS / generation)
    config.name_or_path = ""
    config._attn_implementation = attention
    model = MiniCPMV(config).float()
    about = json.loads((GOLDENS / generation / "forward.json").read_text())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "resampler.pos_embed":
                values = golden_weight(
                    name, tuple(parameter.shape), seed=about["fill_seed"], v2=generation == "v2"
                )
                parameter.copy_(torch.from_numpy(values))
    return model.to(dtype).train(), about


def as_patches(pixels):
    """[3, H, W] -> [3, 14, 14 * L], patches row-major."""
    high, wide = pixels.shape[1] // 14, pixels.shape[2] // 14
    return pixels.reshape(3, high, 14, wide, 14).transpose(0, 2, 1, 3, 4).reshape(3, 14, -1)


def golden_batch(generation, case, rows):
    """The case's rows, in the batch form of the collator."""
    arrays = np.load(GOLDENS / generation / "forward.npz")
    read = {
        name: [arrays[f"{case}.{row}.{name}"] for row in rows]
        for name in ("input_ids", "labels", "tgt_sizes")
    }
    length = max(len(ids) for ids in read["input_ids"])
    batch = {
        "input_ids": torch.zeros(len(rows), length, dtype=torch.int64),
        "labels": torch.full((len(rows), length), -100),
        "tgt_sizes": torch.from_numpy(np.concatenate(read["tgt_sizes"])),
    }
    bounds, pixels = [], []
    for place, row in enumerate(rows):
        for name in ("input_ids", "labels"):
            batch[name][place, : len(read[name][place])] = torch.from_numpy(read[name][place])
        bounds += [[place, *bound] for bound in arrays[f"{case}.{row}.image_bound"].tolist()]
        count = len(read["tgt_sizes"][place])
        pixels += [as_patches(arrays[f"{case}.{row}.pixels.{index}"]) for index in range(count)]
    batch["image_bound"] = torch.tensor(bounds).reshape(-1, 3)
    batch["pixel_values"] = torch.from_numpy(
        np.concatenate([np.zeros((3, 14, 0), np.uint8), *pixels], axis=-1)
    )
    return batch


def temporal_ids(packs_of_rows):
    packs = [pack for row in packs_of_rows for pack in row]
    return torch.tensor([[number, time] for number, pack in enumerate(packs) for time in pack])


def full_batch(generation, case, about):
    info = about["cases"][case]
    batch = golden_batch(generation, case, range(info["rows"]))
    if info.get("temporal_ids"):
        batch["temporal_ids"] = temporal_ids(info["temporal_ids"])
    return batch, info


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
    embeddings = model.embed(**{name: value for name, value in batch.items() if name != "labels"})
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
        name: abs(parameter.grad.norm().item() - info["grad_norms"][name]) / info["grad_norms"][name]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ZERO_GRADIENTS not in name
    }
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


@pytest.mark.parametrize("generation", SIX)
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

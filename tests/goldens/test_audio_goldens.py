"""The audio encoder, its projection and pooling against the released code's outputs.

Run with ``-s`` for a table of generation x case x worst error.
"""

import json

import numpy as np
import pytest
import torch

from minicpm_tune.models.minicpmv.audio import AudioEncoder, AudioProjection, Segment, pooled
from support.golden_models import golden_weight
from support.paths import GOLDENS

# Worst values measured on torch 2.13 (CPU) stand behind each.
FEATURE_TOLERANCE = 1e-5  # 2.5e-6 (o2_6_audio omni)
GRADIENT_TOLERANCE = 1e-5  # relative, packed against alone
ABOUT = {name: json.loads((GOLDENS / name / "forward.json").read_text()) for name in ("o2_6_audio", "o4_5")}
CASES = [
    (name, case, row, case, None)
    for name, about in ABOUT.items()
    for case, info in about["cases"].items()
    for row, audios in enumerate(info.get("audios") or ())
    if audios
]
VARIANTS = [
    (name, variant["case"], variant["row"], variant["name"], variant["config"]["audio_chunk_length"])
    for name, about in ABOUT.items()
    for variant in about["variants"]
]


def build(generation, chunk_seconds=None):
    config = json.loads((GOLDENS / generation / "config.json").read_text())
    if chunk_seconds is None:
        chunk_seconds = config["audio_chunk_length"]
    encoder = AudioEncoder(config["audio_config"], chunk_seconds=chunk_seconds)
    projection = AudioProjection(config["audio_config"]["encoder_ffn_dim"] // 4, config["hidden_size"])
    with torch.no_grad():
        for prefix, module in (("apm", encoder), ("audio_projection_layer", projection)):
            for name, parameter in module.named_parameters():
                values = golden_weight(
                    f"{prefix}.{name}", tuple(parameter.shape), seed=ABOUT[generation]["fill_seed"], v2=False
                )
                parameter.copy_(torch.from_numpy(values))
    return encoder, projection, config["audio_pool_step"]


def segments_of(generation, case, row):
    """The golden mel frames of a row, side by side, and its segments."""
    arrays = np.load(GOLDENS / generation / "forward.npz")
    lengths = ABOUT[generation]["cases"][case]["audio_feature_lens"][row]
    mel = np.concatenate([arrays[f"{case}.{row}.mel.{index}"] for index in range(len(lengths))], axis=1)
    return torch.from_numpy(mel), [Segment(length, max(lengths)) for length in lengths]


@pytest.mark.parametrize(("generation", "case", "row", "key", "chunk_seconds"), CASES + VARIANTS)
def test_audio_tokens_equal_the_released_code(generation, case, row, key, chunk_seconds):
    encoder, projection, pool = build(generation, chunk_seconds)
    mel, segments = segments_of(generation, case, row)
    with torch.no_grad():
        encoded = encoder(mel, segments)
        found = pooled(projection(encoded), segments, pool).numpy()
    arrays = np.load(GOLDENS / generation / "forward.npz")
    name = key if key != case else f"{case}.{row}"
    rows = arrays.get(f"{name}.audio_embed_rows", np.arange(len(found)))
    error = np.abs(found[rows] - arrays[f"{name}.audio_embeds"]).max()
    print(f"\n{generation:10} {name:20} {error:.1e}")
    assert error < FEATURE_TOLERANCE
    if f"{name}.apm_output" in arrays:
        assert np.abs(encoded.numpy() - arrays[f"{name}.apm_output"]).max() < FEATURE_TOLERANCE


@pytest.mark.parametrize("generation", ABOUT)
def test_names_and_shapes_are_the_released_ones_and_the_positions_are_frozen(generation):
    encoder, projection, _ = build(generation)
    found = {f"apm.{name}": list(value.shape) for name, value in encoder.named_parameters()}
    found |= {
        f"audio_projection_layer.{name}": list(value.shape) for name, value in projection.named_parameters()
    }
    expected = {
        name: shape for name, shape in ABOUT[generation]["parameters"] if name.startswith(("apm", "audio_"))
    }
    assert found == expected
    frozen = [f"apm.{name}" for name, value in encoder.named_parameters() if not value.requires_grad]
    assert frozen == ABOUT[generation]["frozen"]


def test_segments_side_by_side_give_what_each_conversation_gives_alone():
    encoder, projection, pool = build("o2_6_audio")
    rows = [("two_turns", 0), ("short_audio", 0), ("batch", 2), ("audio", 0)]
    read = [segments_of("o2_6_audio", case, row) for case, row in rows]
    alone, gradients = [], []
    for mel, segments in read:
        tokens = pooled(projection(encoder(mel, segments)), segments, pool)
        alone.append(tokens.detach())
        tokens.square().sum().backward()
    gradients = {
        name: value.grad.clone() for name, value in encoder.named_parameters() if value.requires_grad
    }
    encoder.zero_grad()
    segments = [segment for _, part in read for segment in part]
    together = pooled(
        projection(encoder(torch.cat([mel for mel, _ in read], dim=1), segments)), segments, pool
    )
    torch.testing.assert_close(together.detach(), torch.cat(alone), rtol=0, atol=FEATURE_TOLERANCE)
    together.square().sum().backward()
    for name, value in encoder.named_parameters():
        if value.requires_grad:
            error = (value.grad - gradients[name]).norm() / gradients[name].norm()
            assert error < GRADIENT_TOLERANCE, name

"""Models filled by the goldens' rule, and the goldens' batches."""

import json
import zlib

import numpy as np
import torch

from minicpm_tune.models.minicpmv.audio import Segment
from minicpm_tune.models.minicpmv.configuration import MiniCPMVConfig
from minicpm_tune.models.minicpmv.modeling import MiniCPMV
from support.paths import GOLDENS

SIX = ("v2", "v2_5", "v2_6", "o2_6", "v4", "v4_5")
HEARING = ("o2_6_audio", "o4_5")
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
    config = MiniCPMVConfig.from_pretrained(GOLDENS / generation)
    config.name_or_path = ""
    config._attn_implementation = attention
    model = MiniCPMV(config).float()
    about = json.loads((GOLDENS / generation / "forward.json").read_text())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "resampler.pos_embed":  # a fixed table
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


def golden_audio(generation, case, info):
    """The audio keys of a batch; what has no place at a row's end is dropped, as released."""
    pool = json.loads((GOLDENS / generation / "config.json").read_text())["audio_pool_step"]
    arrays = np.load(GOLDENS / generation / "forward.npz")
    mels, segments, bounds = [np.zeros((80, 0), np.float32)], [], []
    for row, lengths in enumerate(info["audio_feature_lens"]):
        own = arrays[f"{case}.{row}.audio_bounds"].tolist()
        left = sum(end - start for start, end in own)
        for index, length in enumerate(lengths):
            mels.append(arrays[f"{case}.{row}.mel.{index}"])
            kept = min(Segment(length, max(lengths)).tokens(pool), left)
            left -= kept
            segments.append([length, max(lengths), kept])
        bounds += [[row, *bound] for bound in own]
    return {
        "audio_values": torch.from_numpy(np.concatenate(mels, axis=1)),
        "audio_segments": np.array(segments).reshape(-1, 3),
        "audio_bound": np.array(bounds).reshape(-1, 3),
    }


def temporal_ids(packs_of_rows):
    packs = [pack for row in packs_of_rows for pack in row]
    return torch.tensor([[number, time] for number, pack in enumerate(packs) for time in pack])


def full_batch(generation, case, about):
    info = about["cases"][case]
    batch = golden_batch(generation, case, range(info["rows"]))
    if info.get("temporal_ids"):
        batch["temporal_ids"] = temporal_ids(info["temporal_ids"])
    if info.get("audios"):
        batch |= golden_audio(generation, case, info)
    return batch, info

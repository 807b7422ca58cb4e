"""What the tests of InternLM-XComposer2 share: golden models and batches, by the rule the reference used."""

import json
import zlib
from functools import cache

import numpy as np
import torch
from PIL import Image

from minicpm_tune.data.turns import Media, Turn
from minicpm_tune.models.xcomposer2.configuration import XComposer2Config
from minicpm_tune.models.xcomposer2.modeling import XComposer2
from support.golden_checkpoints import processing
from support.paths import GOLDENS

THREE = ("xc2_7b", "xc2_vl_7b", "xc2_4khd_7b")
# The released config.json has no sizes of the vision tower; the reference's was made so small.
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SEED = 20
_WIDE = ("class_embedding", "plora_glb_GN", "plora_sub_GN")


@cache
def about(name):
    return json.loads((GOLDENS / name / "forward.json").read_text())


@cache
def arrays(name):
    with np.load(GOLDENS / name / "forward.npz") as file:
        return {key: file[key] for key in file.files}


def golden_weight(name, shape):
    """The rule by which the reference run filled its parameters."""
    state = np.random.RandomState((zlib.crc32(name.encode()) + SEED) % 2**32)
    values = np.asarray(state.standard_normal(shape), dtype=np.float32)
    if "tok_embeddings" in name or "position_embedding" in name or name.endswith(_WIDE):
        return 0.3 * values
    if len(shape) == 1:
        return 1 + 0.1 * values if name.endswith("weight") else 0.05 * values
    return values * (1.2 / np.sqrt(np.prod(shape[1:])))


def golden_config(name, **changes):
    released = json.loads((GOLDENS / name / "config.json").read_text())
    return released | {"vision_config": VISION} | changes


def golden_model(name, *, attention="sdpa", **changes):
    config = XComposer2Config(golden_config(name, **changes))
    config._attn_implementation = attention
    model = XComposer2(config).float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(golden_weight(key, tuple(parameter.shape))))
    return model.eval()


def rules(name):
    """The data side of the golden checkpoint; 4khd with the reference's number of tiles."""
    tiles = about(name)["hd_num"]
    return processing(name, hd_num=tiles) if tiles else processing(name)


def golden_images(name, case, row=0):
    found = []
    while (key := f"{case}.{row}.image{len(found)}") in arrays(name):
        found.append(Image.fromarray(arrays(name)[key]))
    return found


def turns_of(messages):
    """Turns of a row in the documented form, without our own reader."""
    number, turns = 0, []
    roles = {"user": "user", "assistant": "assistant", "system": "system"}
    for message in messages:
        parts = []
        for index, text in enumerate(message["value"].split("<ImageHere>")):
            if index:
                parts.append(Media("image", number))
                number += 1
            if text:
                parts.append(text)
        turns.append(Turn(roles[message["from"]], tuple(parts)))
    return turns


def golden_batch(name, case):
    """A case as a batch, the reference's ids and targets with our pixels and bounds."""
    rows = about(name)["cases"][case]["rows"]
    read = arrays(name)
    ids = np.stack([read[f"{case}.{row}.input_ids"] for row in range(len(rows))])
    labels = np.stack([read[f"{case}.{row}.targets"] for row in range(len(rows))])
    batch = {
        "input_ids": torch.from_numpy(ids).long().clamp(min=0),
        "labels": torch.from_numpy(labels).long(),
    }
    pixels, sizes, bounds = [], [], []
    for row in range(len(rows)):
        images = golden_images(name, case, row)
        if not images:
            continue
        turns = [Turn("user", tuple(Media("image", index) for index in range(len(images))))]
        sample = rules(name).encode_prompt(turns, images)
        pixels.append(sample["pixel_values"])
        sizes.append(sample["tgt_sizes"])
        lengths = (sample["image_bound"][:, 1] - sample["image_bound"][:, 0]).tolist()
        places = np.flatnonzero(read[f"{case}.{row}.im_mask"])
        assert len(places) == sum(lengths)
        for length in lengths:
            bounds.append([row, int(places[0]), int(places[0]) + length])
            places = places[length:]
    if pixels:
        batch |= {"pixel_values": torch.cat(pixels, dim=2), "tgt_sizes": torch.cat(sizes)}
        batch["image_bound"] = torch.tensor(bounds)
    return batch


def without_labels(batch):
    return {key: value for key, value in batch.items() if key != "labels"}

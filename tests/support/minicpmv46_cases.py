"""Small models of the family minicpmv46, and batches for them, shared by the tests of the native generations."""

from __future__ import annotations

import json
import zlib
from contextlib import contextmanager

import numpy as np
import torch
import transformers
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.models.loading import model_class
from support.paths import GOLDENS

NATIVE = ("v4_6", "v4_7")
# Those without goldens of their own: the ones they share images and prompts with, and what their config has besides.
_EXPERTS = {
    "model_type": "qwen3_5_moe_text", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}  # fmt: skip
_DERIVED = {"v4_7_moe": ("v4_7", {}, _EXPERTS), "ocr_1": ("v4_6", {"model_type": "minicpm_ocr"}, {})}
SLICED = ((8, 8), (4, 8), (4, 8), (4, 8), (4, 8))  # patches: an overview and 2 x 2 slices
# Token ids of the goldens' tokenizer.
IMAGE, IMAGE_END, SLICE, SLICE_END, PAD_IMAGE, NEWLINE = 6, 7, 8, 9, 12, 216


def fill_by_name(model):
    """Fill every parameter by a rule on its name, so that two models of one kind are equal."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            seed = (zlib.crc32(name.encode()) + 20) % 2**32
            noise = np.random.RandomState(seed).standard_normal(tuple(parameter.shape)).astype(np.float32)
            if parameter.ndim == 1:
                noise = 1 + 0.1 * noise if name.endswith("weight") else 0.05 * noise
            elif "embed" in name:
                noise = 0.3 * noise
            else:
                noise = noise * (1.2 / np.sqrt(np.prod(parameter.shape[1:])))
            parameter.copy_(torch.from_numpy(np.asarray(noise, dtype=np.float32)))


def golden_config(name, *, mode="16x", attention="sdpa", **text):
    """The configuration of a golden model; ``text`` are settings of the LLM."""
    source, own, experts = _DERIVED.get(name, (name, {}, {}))
    content = json.loads((GOLDENS / source / "config.json").read_text()) | own | {"downsample_mode": mode}
    content["text_config"] |= experts | text
    del content["vision_config"]["model_type"]
    config = AutoConfig.for_model(content.pop("model_type"), **content)
    config._attn_implementation = attention
    # One expert after the other: the only way that also computes in fp64.
    config.text_config._experts_implementation = "eager"
    return config


def our_model(name, **options):
    """Our model; ``options`` as of ``golden_config``."""
    model = model_class(GENERATIONS[name])(golden_config(name, **options))
    fill_by_name(model)
    return model.train()


def transformers_model(name, **options):
    model = getattr(transformers, model_class(GENERATIONS[name]).__name__)(golden_config(name, **options))
    fill_by_name(model)
    return model.train()


def golden_sample(name, case, mode="16x"):
    """A golden case as a sample of ours, and the pixels as transformers' own processor normalizes them."""
    source = _DERIVED.get(name, (name,))[0]
    golden = json.loads((GOLDENS / source / "processor.json").read_text())["cases"][case]
    ids = torch.tensor(golden["input_ids"])
    labels = ids.clone()
    labels[:-20] = -100
    sample = {"input_ids": ids, "labels": labels, "pixel_values": torch.zeros(3, 14, 0, dtype=torch.uint8)}
    if not golden["images"]:
        return sample | {"tgt_sizes": torch.zeros(0, 2, dtype=torch.int32)}, None
    images = [Image.open(GOLDENS / "images" / f"{image}.png").convert("RGB") for image in golden["images"]]
    processor = MiniCPMV4_6ImageProcessorPil()
    released = processor(images, downsample_mode=mode, return_tensors="pt")
    raw = processor(images, downsample_mode=mode, do_rescale=False, do_normalize=False, return_tensors="pt")
    sample |= {"pixel_values": raw["pixel_values"][0].to(torch.uint8), "tgt_sizes": raw["target_sizes"]}
    return sample, released["pixel_values"]


def made_sample(seed, *, images=((4, 8),), before=5, after=9, per_token=16):
    """A sample with random text and pixels.

    ``images``: one (rows, columns) in patches each, or a list of them: overview, then slices two to a row.
    """
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, 200, (before,), generator=rng).tolist()
    grids = []
    for image in images:
        parts = [image] if isinstance(image[0], int) else list(image)
        for number, (rows, columns) in enumerate(parts):
            if number > 1 and number % 2:
                ids.append(NEWLINE)
            tags = (IMAGE, IMAGE_END) if number == 0 else (SLICE, SLICE_END)
            ids += [tags[0], *[PAD_IMAGE] * (rows * columns // per_token), tags[1]]
            grids.append((rows, columns))
        ids += [NEWLINE]
    answer = torch.randint(20, 200, (after,), generator=rng).tolist()
    patches = sum(rows * columns for rows, columns in grids)
    return {
        "input_ids": torch.tensor(ids + answer),
        "labels": torch.tensor([-100] * len(ids) + answer),
        "pixel_values": torch.randint(0, 256, (3, 14, 14 * patches), generator=rng, dtype=torch.uint8),
        "tgt_sizes": torch.tensor(grids, dtype=torch.int32).view(-1, 2),
    }


def batch_of(rows, *, packed=True):
    """Rows of samples, each row a list, as one batch padded on the right."""

    def padded(key, value):
        return pad_sequence([torch.cat([sample[key] for sample in row]) for row in rows], True, value)

    positions = [torch.cat([torch.arange(len(sample["input_ids"])) for sample in row]) for row in rows]
    flat = [sample for row in rows for sample in row]
    batch = {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "attention_mask": pad_sequence(
            [torch.ones(len(row), dtype=torch.int64) for row in positions], True, 0
        ),
        "pixel_values": torch.cat([sample["pixel_values"] for sample in flat], dim=-1),
        "tgt_sizes": torch.cat([sample["tgt_sizes"] for sample in flat]),
    }
    if packed:
        batch["position_ids"] = pad_sequence(positions, True, 0)
    return batch


def gradients(model):
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def worst_gradient_error(found, expected):
    """Largest norm of a difference, relative to the expected norm, or to 1/1000 of the largest one.

    The floor is for the bias of a key projection, whose gradient is zero but for rounding.
    """
    floor = 1e-3 * max(gradient.norm() for gradient in expected.values())
    return max(
        float((found[name] - expected[name]).norm() / expected[name].norm().clamp(min=floor))
        for name in expected
    )


def loss_and_gradients(model, batch, **options):
    model.zero_grad()
    output = model(**batch, **options)
    output.loss.backward()
    return output, gradients(model)


@contextmanager
def one_thread():
    """These models are too small to share among threads, which only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def released_inputs(name, sample, pixels):
    """What transformers' own processor would give its own class."""
    inputs = {"input_ids": sample["input_ids"][None], "labels": sample["labels"][None], "use_cache": False}
    if pixels is not None:
        inputs |= {"pixel_values": pixels, "target_sizes": sample["tgt_sizes"]}
        if name.startswith("v4_7"):
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == PAD_IMAGE).int()
    return inputs


def normalized(sample):
    return ((sample["pixel_values"].float() / 255 - 0.5) / 0.5)[None] if len(sample["tgt_sizes"]) else None


def packing_samples():
    return [
        made_sample(1, images=[SLICED]),
        made_sample(2, images=()),
        made_sample(3, images=[(4, 4), (4, 8)], after=60),
        made_sample(4, images=(), before=40, after=23),
        made_sample(5, images=[(8, 4)], before=2),
    ]


def packed_rows(samples):
    return [[samples[0], samples[1], samples[2]], [samples[3], samples[4]]]


def without_labels(batch):
    return {key: value for key, value in batch.items() if key != "labels"}

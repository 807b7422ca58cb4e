"""Tiny checkpoints of every generation in the released layout, and adapters trained on them."""

from __future__ import annotations

import atexit
import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch

import merge_lora
from make_checkpoint import make_checkpoint
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.data.samples import load_processing
from minicpm_tune.lora.adapter_folders import complete_adapter_folder
from minicpm_tune.lora.build import add_adapter
from minicpm_tune.lora.merging import probe_logits
from minicpm_tune.models.loading import load_model
from minicpm_tune.settings.argument_groups import LoraArguments

SIX = ("v2", "v2_5", "v2_6", "o2_6", "v4", "v4_5")
ALL = (*SIX, "v4_6", "v4_7")


def _temporary(prefix):
    """A folder that is removed when the tests end."""
    folder = Path(mkdtemp(prefix=prefix))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def checkpoint(name, seed=0):
    """A small checkpoint in the released layout; the same folder for all tests, which leave it alone."""
    folder = _temporary("minicpmv-") / f"MiniCPM-{name}-{seed}"
    return make_checkpoint(folder, name, size="tiny", seed=seed)


def loaded(folder, name, dtype=torch.float32, **options):
    return load_model(folder, dtype=dtype, **options).eval()


def tuned(model, name, *, vision=False, **lora):
    """A model with an adapter that changes it, as after training."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        wrapped = add_adapter(
            model, GENERATIONS[name], LoraArguments(lora_r=4, **lora), vision=vision, resampler=True
        )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return wrapped.eval()


def saved_adapter(folder, name, *, base=None, complete=True, quant_bits=None, **options):
    """A trained adapter on disk, and the model with it."""
    base = base or checkpoint(name)
    wrapped = tuned(loaded(base, name), name, **options)
    wrapped.save_pretrained(folder)
    if complete:
        complete_adapter_folder(folder, base=base, generation=GENERATIONS[name], quant_bits=quant_bits)
    return wrapped


@cache
def merged_checkpoint(name):
    """A checkpoint that merge_lora.py made with the default adapter, and the logits it must give."""
    folder = _temporary("minicpmv-merged-")
    expected = logits(saved_adapter(folder / "adapter", name, vision=True), name)
    words = ["--adapter", folder / "adapter", "--output_dir", folder / "merged"]
    merge_lora.run(merge_lora.parse_flags([str(word) for word in words]))
    return folder / "merged", expected


def logits(model, name):
    return probe_logits(model, load_processing(checkpoint(name)))


def edit_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))


def copied(folder, target):
    shutil.copytree(folder, target)
    return target

"""A step without and with liger's kernels, on a CPU: triton runs them one program after another.

TRITON_INTERPRET=1 liger_worker.py CHECKPOINT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("finetune", "demo", "tests")]

import numpy as np
import torch
import triton.language as tl
from liger_kernel.ops import rms_norm
from triton.runtime import interpreter

from minicpm_tune.data.sample_tensors import data_collator
from minicpm_tune.data.samples import load_processing
from minicpm_tune.models.loading import load_model
from minicpm_tune.models.speed_options import apply_liger
from support.training_samples import draw


def as_argument(value):
    """An argument of an interpreted kernel; triton 3.9 leaves numbers as they are, which kernels then can't cast."""
    if not isinstance(value, float):
        return as_triton_does(value)
    return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)


as_triton_does, interpreter._implicit_cvt = interpreter._implicit_cvt, as_argument
rms_norm.rsqrt = lambda value: tl.rsqrt(value)  # otherwise that of a library for GPUs


def step(model, batch):
    """The loss, and all gradients as one vector."""
    model.zero_grad()
    torch.manual_seed(0)  # XComposer2's partial LoRA has dropout
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), torch.cat(
        [value.grad.flatten() for value in model.parameters() if value.grad is not None]
    )


def main():
    checkpoint = Path(sys.argv[1])
    model = load_model(checkpoint, dtype=torch.float32).train()
    with torch.no_grad():  # norms that are all ones would hide a wrong weight
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    batch = data_collator(draw(load_processing(checkpoint))[:2], packing=False)
    del batch["provenance"]
    loss, gradient = step(model, batch)
    apply_liger(model)
    patched = [module for module in model.modules() if hasattr(module, "casting_mode")]
    with_kernels, found = step(model, batch)
    distance = ((found - gradient).norm() / gradient.norm()).item()
    result = {"losses": [loss, with_kernels], "gradient": distance, "modules": len(patched)}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

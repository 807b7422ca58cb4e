"""What a training step holds at its peak: on the CUDA device that does nothing, and as planned.

    fake_cuda_memory.py DEVICE_LIBRARY CASES

CASES is JSON: a list of objects with ``generation``, ``folder`` (config.json is enough), ``packed`` (samples in each
row; 0: padded rows) and ``training``, the fields of ``memory_plan.Training``. For each, one JSON object goes to stdout.
"""

from __future__ import annotations

import json
import os
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.fake_cuda_worker import FakeCuda, gpu, move, on_device  # loads the device, so before torch

# isort: split

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.data.sample_tensors import data_collator
from minicpm_tune.planning.memory_plan import DTYPES, Training, largest_sample, prepared_model, step_peak
from minicpm_tune.settings.argument_groups import LoraArguments


class Counted(TorchDispatchMode):
    """Adds up the storages on the device that exist at a time."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor) and value.is_cuda:
                self.count(value.untyped_storage())
        return made

    def count(self, storage):
        if storage._cdata in self.known:
            return
        self.known[storage._cdata] = storage
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.forget, storage.nbytes())

    def forget(self, size):
        self.live -= size


def fused(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """The kernels that torch takes on a GPU: flash, or with a mask the memory-efficient one."""
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (part.to(torch.get_autocast_dtype("cuda")) for part in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, is_causal, scale=scale
        )[0]
    bias = torch.zeros_like(attn_mask, dtype=query.dtype).expand(query.shape[0], query.shape[1], -1, -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, query.requires_grad, 0.0, is_causal, scale=scale
    )[0]


def batch_of(model, generation, training, packed):
    """Full rows; or packed ones, whose samples have their share of the tokens and slices."""
    parts = packed or 1
    sample = largest_sample(
        model,
        generation,
        length=training.model_max_length // parts,
        slices=(training.max_slice_nums + 1) // parts,
    )
    rows = [[sample] * parts if packed else sample] * training.batch_size
    return data_collator(rows, packing=bool(packed))


def counted(model, batch, training):
    """Bytes at the peak of forward and backward on the device, without the model's own."""
    autocast = training.zero == 0 and training.precision != "fp32"
    with FakeCuda(), gpu((9, 0)), mock.patch("torch.nn.functional.scaled_dot_product_attention", fused):
        move(model)
        meter = Counted()
        for value in [*model.parameters(), *model.buffers()]:
            meter.known[value.untyped_storage()._cdata] = value.untyped_storage()
        for parameter in model.parameters():
            if parameter.requires_grad and training.zero:  # partitioned as soon as it is complete
                parameter.register_post_accumulate_grad_hook(lambda done: setattr(done, "grad", None))
        with meter:
            inputs = on_device(batch)
            with torch.autocast("cuda", dtype=DTYPES[training.precision]) if autocast else nullcontext():
                loss = model(**inputs).loss
            loss.backward()
    return meter.peak


def run(case):
    """Both numbers of a case."""
    generation, folder = GENERATIONS[case["generation"]], Path(case["folder"])
    options = dict(case["training"])
    lora = LoraArguments(**options.pop("lora", {}))
    training = Training(**options, lora=lora)
    planned = step_peak(prepared_model(folder, generation, training), generation, training)
    model = prepared_model(folder, generation, training)
    base = model if training.method == "full" else model.get_base_model()
    if training.gradient_checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    batch = batch_of(base, generation, training, case["packed"])
    return {"counted": counted(model, batch, training), "planned": dict(planned)}


def main():
    for case in json.loads(sys.argv[2]):
        sys.stdout.write(json.dumps(run(case)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # a thread of the made-up device can abort the interpreter while it shuts down

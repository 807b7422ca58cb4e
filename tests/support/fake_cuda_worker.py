"""Forward and backward of a tiny model in every way of training, on a CUDA device that does nothing.

    fake_cuda_worker.py DEVICE_LIBRARY JOBS

JOBS is JSON, {name: {"generation": ..., "checkpoint": ..., "capability": [9, 0], "cases": ..., "attention": "sdpa"}},
with "all", "few" or "packed" cases; a job without a generation shows what the device does with errors.
What is on the device has a device, a dtype and a shape and no values: tensors on two devices and unequal dtypes in a
product raise as they would on a GPU, and reading a value back raises where a GPU would wait. One JSON object per case
goes to stdout, with the name of its job.
"""

from __future__ import annotations

import ctypes
import sys

ctypes.CDLL(sys.argv[1])  # torch looks for its devices when it is imported

import json
import os
import traceback
from collections import Counter
from contextlib import ExitStack, nullcontext
from itertools import product
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("finetune", "demo", "tests")]

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.data.sample_tensors import data_collator
from minicpm_tune.data.samples import load_processing
from minicpm_tune.lora.build import add_adapter
from minicpm_tune.models.autocast import hold_activations_in_16_bit
from minicpm_tune.models.parameter_parts import freeze, raise_precision_of_trained
from minicpm_tune.models.speed_options import set_checkpointing
from minicpm_tune.planning.step_memory import build_on_meta
from minicpm_tune.settings.argument_groups import LoraArguments
from support.training_samples import draw

DEVICE = "cuda:0"
# What weights are held in, and what autocast computes in: without DeepSpeed, and with it.
PRECISIONS = {
    "bf16 autocast": (torch.bfloat16, torch.bfloat16),
    "fp16 autocast": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
}
# Packing, precision, method, checkpointing.
CASES = {
    "all": (
        *product((False, True), PRECISIONS, ("full", "lora"), (False,)),
        *product((False, True), ["bf16 autocast"], ("full", "lora"), (True,)),
    ),
    "few": (
        (True, "bf16 autocast", "lora", False),
        (True, "bf16", "lora", False),
        (False, "fp16 autocast", "full", False),
        (False, "bf16 autocast", "full", True),
    ),
    "packed": ((True, "bf16 autocast", "lora", False), (True, "fp16", "lora", False)),
}

# Operations whose kernels take tensors of one dtype; without values torch does not check all of them.
ONE_DTYPE = {
    getattr(torch.ops.aten, name)
    for name in ("mm addmm bmm baddbmm convolution index_put index_put_ index_copy index_copy_ index_add "
                 "index_add_ scatter scatter_ scatter_add scatter_add_ masked_scatter masked_scatter_").split()
}  # fmt: skip

# This build of torch has no CUDA kernel of it, and would take it apart into operations that make larger tensors.
KERNELS = torch.library.Library("aten", "IMPL", "CUDA")
KERNELS.impl("silu_backward", lambda slope, hidden: torch.empty_like(hidden))

COPIES = {torch.ops.aten._to_copy, torch.ops.aten.copy_}

calls = Counter()  # of attention kernels


class FakeCuda(TorchDispatchMode):
    """Runs what touches the device in FakeTensorMode, and everything else for real.

    Attributes:
        waits: Copies for which the program would wait: from the device, and to it where the copy blocks.
        cast: Bytes written by changes of the floating-point dtype.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode()
        self.waits = []
        self.cast = 0

    def __enter__(self):
        # As FakeTensorMode does: torch.tensor(..., device=) copies where modes see it.
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)

    def without_values(self, value):
        """A tensor of the CPU as it arrives on the device."""
        return value if isinstance(value, FakeTensor) else self.fake.from_tensor(value)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        to_device = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        if not to_device and not any(isinstance(value, FakeTensor) for value in given):
            return function(*args, **kwargs)
        dtypes = {value.dtype for value in given if value.is_floating_point()}
        if len(dtypes) > 1 and function.overloadpacket in ONE_DTYPE:
            raise TypeError(f"{function} of {dtypes}")
        args, kwargs = tree_map_only(torch.Tensor, self.without_values, (args, kwargs))
        with self.fake:
            made = function(*args, **kwargs)
        results = [value for value in tree_leaves(made) if isinstance(value, torch.Tensor)]
        there, back = any(value.is_cuda for value in given), any(not value.is_cuda for value in results)
        copied = given and not there and not kwargs.get("non_blocking") and function.overloadpacket in COPIES
        if (there and back) or copied:
            self.waits.append(f"{function}{place()}")
        if there and function.overloadpacket in COPIES and len(dtypes | {made.dtype}) > 1:
            self.cast += made.nbytes
        return made


def place():
    """The innermost line of the product's own code."""
    own = [frame for frame in traceback.extract_stack() if f"{ROOT}/finetune/" in frame.filename]
    return f" in {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""


def varlen_attn(query, key, value, query_ends, key_ends, longest_query, longest_key, **options):
    """torch's own, after what its kernel asks for."""
    dtypes = {part.dtype for part in (query, key, value)}
    assert dtypes in ({torch.float16}, {torch.bfloat16}), f"dtypes {dtypes} at a varlen kernel"
    assert query.shape[-1] % 8 == 0, f"head width {query.shape[-1]} at a varlen kernel"
    for ends in (query_ends, key_ends):
        assert ends.dtype == torch.int32, f"ends are {ends.dtype}"
        assert ends.is_cuda, "ends are on the CPU"
    assert all(part.is_cuda and part.is_contiguous() for part in (query, key, value))
    assert all(isinstance(longest, int) for longest in (longest_query, longest_key))
    calls["varlen"] += 1
    return real_varlen(query, key, value, query_ends, key_ends, longest_query, longest_key, **options)


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """Written out, as a CPU build of torch has no kernel for the device; what the kernel asks for holds."""
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (part.to(torch.get_autocast_dtype("cuda")) for part in (query, key, value))
    assert query.dtype == key.dtype == value.dtype, (
        f"dtypes {query.dtype}, {key.dtype}, {value.dtype} at sdpa"
    )
    assert all(part.is_cuda for part in (query, key, value))
    assert attn_mask is None or (attn_mask.is_cuda and attn_mask.dtype in (torch.bool, query.dtype))
    assert enable_gqa or query.shape[1] == key.shape[1], "fewer key heads than query heads"
    assert attn_mask is None or not is_causal
    calls["masked sdpa" if attn_mask is not None else "sdpa"] += 1
    groups = query.shape[1] // key.shape[1]
    with torch.autocast("cuda", enabled=False):  # a kernel's own precision is no cast
        scores = query @ key.repeat_interleave(groups, 1).transpose(-1, -2)
        return scores.softmax(-1) @ value.repeat_interleave(groups, 1)


real_varlen = varlen.varlen_attn


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
    causal=False, window_size=(-1, -1), deterministic=False,
):  # fmt: skip
    """What the package flash-attn has under this name."""
    assert causal
    calls["flash"] += 1
    ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), *ends, window_size=(-1, 0), enable_gqa=True
    )


# For packed rows, for samples of known ends, with a cache, and what pads and takes padding away: none but the second
# may be called.
FLASH_ATTENTION = (None, flash_attn_varlen_func, None, None, None)


def gpu(capability):
    """Make torch believe in the device, inside the with block."""
    stack = ExitStack()
    for target, value in {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.is_bf16_supported": lambda *_, **__: capability >= (8, 0),
        "torch.cuda.get_device_capability": lambda *_: capability,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.nn.functional.scaled_dot_product_attention": scaled_dot_product_attention,
        "torch.nn.attention.varlen.varlen_attn": varlen_attn,
        "transformers.modeling_flash_attention_utils._lazy_imports": lambda *_, **__: FLASH_ATTENTION,
    }.items():
        stack.enter_context(mock.patch(target, value))
    return stack


def move(model):
    """Put parameters and buffers on the device; shared ones stay shared."""
    moved = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, value in store.items():
                if value is not None and id(value) not in moved:
                    empty = torch.empty(value.shape, dtype=value.dtype, device=DEVICE)
                    moved[id(value)] = (
                        nn.Parameter(empty, requires_grad=value.requires_grad)
                        if isinstance(value, nn.Parameter)
                        else empty
                    )
                if value is not None:
                    store[name] = moved[id(value)]


class Training:
    """What ``set_checkpointing`` reads."""

    gradient_checkpointing = True
    activation_checkpointing_kwargs = None
    vision_gradient_checkpointing = None


def model_of(folder, generation, *, dtype, autocast, method, checkpointing, attention):
    """A model as finetune.py prepares it for a way of training."""
    model = build_on_meta(folder, generation).to(dtype).train()
    if attention != "sdpa":
        getattr(model, "llm", model).config.get_text_config()._attn_implementation = attention
    if checkpointing:
        set_checkpointing(model, generation, Training())
    if method == "lora":
        with torch.device("meta"):
            lora = LoraArguments(lora_r=8)
            model = add_adapter(model, generation, lora, vision=True, resampler=True)
        if autocast is None:
            model.to(dtype)
    else:
        freeze(model, generation, vision=True, resampler=True, llm=True)
    if autocast is not None:
        raise_precision_of_trained(model)
        hold_activations_in_16_bit(model, residual=autocast is torch.bfloat16)
    return model


def output_dtypes(model):
    """A set that the dtypes of the sums running through all layers go to, at the end of each."""
    found = set()

    def note(block, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        found.add(str(hidden.dtype).removeprefix("torch."))

    for module in model.modules():
        if (
            type(module).__name__.endswith(("Layer", "Block"))
            and type(module).__name__ in model._no_split_modules
        ):
            module.register_forward_hook(note)
    return found


def on_device(batch):
    """The batch as the trainer gives it to the model: tensors on the device, arrays where they are."""
    found = {
        name: torch.empty(value.shape, dtype=value.dtype, device=DEVICE)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in batch.items()
        if name != "provenance"
    }
    return {**found, "num_items_in_batch": torch.empty((), dtype=torch.int64, device=DEVICE)}


def run(folder, generation, samples, *, packing, precision, method, checkpointing, capability, attention):
    """One step; what it did, or why it could not."""
    calls.clear()
    dtype, autocast = PRECISIONS[precision]
    batch = data_collator([samples] if packing else samples, packing=packing)
    model = model_of(
        folder, generation, dtype=dtype, autocast=autocast, method=method, checkpointing=checkpointing,
        attention=attention,
    )  # fmt: skip
    with FakeCuda() as device, gpu(capability):
        move(model)
        blocks = output_dtypes(model)
        inputs = on_device(batch)
        with nullcontext() if autocast is None else torch.autocast("cuda", dtype=autocast):
            loss = model(**inputs).loss
        loss.backward()
        trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    return {
        "cast": device.cast,
        "trained": sum(value.numel() for _, value in trained),
        "blocks": sorted(blocks),
        "loss": str(loss.dtype),
        "without gradient": [name for name, value in trained if value.grad is None],
        "waits": device.waits,
        "attention": dict(calls),
    }


def outcome(call):
    """The kind of error that a call raises."""
    try:
        call()
    except Exception as error:  # noqa: BLE001  (the test says which)
        return type(error).__name__
    return None


def itself():
    """What the device does with what a GPU would refuse or wait for."""
    with FakeCuda() as device, gpu((9, 0)):
        here, there = torch.ones(3, 3), torch.ones(3, 3, device=DEVICE)
        return {
            "reading a value": outcome(lambda: there.sum().item()),
            "a shape that depends on values": outcome(there.nonzero),
            "two devices": outcome(lambda: there + here),
            "two dtypes": outcome(lambda: there @ there.half()),
            "copies": [
                (there.cpu(), here.to(DEVICE), here.to(DEVICE, non_blocking=True)) is None,
                device.waits,
            ][1],
        }


def run_job(generation, checkpoint, capability=(9, 0), cases="all", attention="sdpa"):
    """What every way of training did."""
    folder, capability = Path(checkpoint), tuple(capability)
    samples = draw(load_processing(folder))
    for packing, precision, method, checkpointing in CASES[cases]:
        if capability < (8, 0) and precision.startswith("bf16"):
            continue
        case = {"packing": packing, "precision": precision, "method": method, "checkpointing": checkpointing}
        options = {**case, "capability": capability, "attention": attention}
        try:
            found = run(folder, GENERATIONS[generation], samples, **options)
        except Exception as error:  # noqa: BLE001  (whatever it is, it is what the test shows)
            trace = "".join(traceback.format_tb(error.__traceback__)[-12:])
            found = {"error": f"{trace}{type(error).__name__}: {str(error)[:400]}"}
        yield {**case, **found}


def main():
    for name, job in json.loads(sys.argv[2]).items():
        for found in run_job(**job) if job else [itself()]:
            sys.stdout.write(json.dumps({"job": name, **found}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # a thread of the made-up device can abort the interpreter while it shuts down

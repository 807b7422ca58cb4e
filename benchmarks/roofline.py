"""An estimate of a training step's time on a GPU, from the operators that our own step runs. Nothing is measured.

    python benchmarks/roofline.py [--generation v4_5] [--length 4096] [--cards h100 4090] [--matrix_rate 0.85]

Forward and backward run on tensors without contents, as in plan_memory.py. Every operator takes the longest of three
times: its operations at the rate that matrix products reach, its bytes at the memory's bandwidth, and the overhead of
a launch. Attention counts the pairs of tokens that a variant computes, at the share of that rate that its kernel
reaches. The estimate leaves out the optimizer's step, communication, and waiting for data.

Variants: a dense mask (all pairs, no flash kernel), variable-length attention with fp32 sums between layers, the same
with 16-bit sums, with liger's kernels besides (the product's default where liger is installed), and without
checkpointing. Of liger's kernels the bytes count: norms, rotary positions, and SwiGLU read and write once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
for folder in ("finetune", "tests", "benchmarks"):
    sys.path.insert(0, str(ROOT / folder))

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.planning import step_memory
from minicpm_tune.planning.memory_plan import Training, prepared_model, step_peak
from minicpm_tune.settings.argument_groups import LoraArguments


@dataclass(frozen=True)
class Card:
    """What a card does per second: bf16 operations of dense matrix products, and bytes, by its data sheet."""

    peak: float
    bytes: float


CARDS = {
    "h100": Card(989e12, 3.35e12),
    "h200": Card(989e12, 4.8e12),
    "a100": Card(312e12, 2.04e12),
    "4090": Card(165e12, 1.01e12),
    "3090": Card(71e12, 0.94e12),
}
_MAKES_NOTHING = ("aten.empty", "aten.new_empty", "aten.detach", "aten.view", "aten._unsafe_view", "aten.t.")


class Operators(step_memory.StepMeter):
    """Lists (operations, bytes) of every operator that works on the device.

    Attributes:
        rows: One pair for each operator.
    """

    rows: list[tuple[float, float]] = []  # noqa: RUF012  (one list for a step, whose meter is made elsewhere)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_dispatch__(func, types, args, kwargs)
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, FakeTensor)]
        out = [value for value in tree_leaves(made) if isinstance(value, FakeTensor)]
        sources = {value.untyped_storage()._cdata for value in given}
        writes = str(func).split(".")[1].endswith("_")
        is_view = bool(out) and not writes and all(value.untyped_storage()._cdata in sources for value in out)
        if out and given and not is_view and not str(func).startswith(_MAKES_NOTHING):
            count = flop_registry.get(func._overloadpacket)
            operations = float(count(*args, **(kwargs or {}), out_val=made)) if count else 0.0
            self.rows.append((operations, float(sum(map(_bytes, [*given, *out])))))
        return made


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Counted(torch.autograd.Function):
    """Attention with the memory of a fused kernel, whose operations are noted: 2 products forward, 5 backward."""

    noted: list[tuple[float, int]] = []  # noqa: RUF012  (one list for a step)

    @staticmethod
    def forward(ctx, query, key, value, causal):
        rows, heads, length, width = query.shape
        ctx.work = 2.0 * rows * heads * length * key.shape[2] * width, causal
        Counted.noted.append((2 * ctx.work[0], causal))
        ctx.save_for_backward(query, key, value)
        return query.new_empty((rows, length, heads, value.shape[-1])).transpose(1, 2)

    @staticmethod
    def backward(ctx, slope):
        Counted.noted.append((5 * ctx.work[0], ctx.work[1]))
        return (*(torch.empty_like(part) for part in ctx.saved_tensors), None)


def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, is_causal: bool = False, **__: Any) -> Tensor:
    """Stands in for torch's attention."""
    return Counted.apply(*(step_memory.to_autocast_dtype(part) for part in (query, key, value)), is_causal)


class Fused(torch.autograd.Function):
    """One kernel that reads its inputs and writes something like the first of them; its backward writes all slopes."""

    @staticmethod
    def forward(ctx, first, *others):
        ctx.save_for_backward(first, *others)
        Operators.rows.append((0.0, float(sum(map(_bytes, (first, first, *others))))))
        return first.new_empty(first.shape)

    @staticmethod
    def backward(ctx, slope):
        saved = ctx.saved_tensors
        slopes = [
            part.new_empty(part.shape) if needed else None
            for part, needed in zip(saved, ctx.needs_input_grad, strict=True)
        ]
        moved = [slope, *saved, *(part for part in slopes if part is not None)]
        Operators.rows.append((0.0, float(sum(map(_bytes, moved)))))
        return tuple(slopes)


def use_fused_kernels(llm: torch.nn.Module) -> None:
    """Let norms, rotary positions, and SwiGLU be a kernel each, as liger's are."""
    for module in llm.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_norm, module)
        elif hasattr(module, "gate_proj") and hasattr(module, "up_proj"):
            module.forward = partial(_gated, module)


def _norm(module: Any, hidden: Tensor) -> Tensor:
    return Fused.apply(hidden, module.weight)


def _gated(module: Any, hidden: Tensor) -> Tensor:
    return module.down_proj(Fused.apply(module.gate_proj(hidden), module.up_proj(hidden)))


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """Stands in for transformers' ``apply_rotary_pos_emb``."""
    return Fused.apply(query, cos, sin), Fused.apply(key, cos, sin)


def operators(
    folder: Path, name: str, training: Training, *, fused: bool
) -> tuple[list[tuple[float, float]], list[tuple[float, int]]]:
    """The operators of a step, and its attention: (operations of all pairs, whether only earlier tokens are seen)."""
    generation = GENERATIONS[name]
    Counted.noted, Operators.rows = [], []

    def loss(model: Any, batch: dict[str, Any]) -> Tensor:
        return model(**batch).loss

    model = prepared_model(folder, generation, training)
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(step_memory, "StepMeter", Operators))
        if fused:
            llm = model.get_submodule(generation.modules["llm"][0])
            use_fused_kernels(llm)
            layers = {type(module).__module__ for module in llm.modules() if hasattr(module, "q_proj")}
            for layer in layers:
                patches.enter_context(mock.patch.object(sys.modules[layer], "apply_rotary_pos_emb", rotate))
        step_peak(model, generation, training, loss=loss, attention=attend)
    return Operators.rows, Counted.noted


def seconds(
    card: Card, rows: Any, attention: Any, given: argparse.Namespace, *, dense: bool
) -> tuple[float, float]:
    """Seconds of a step, and the operations that it needs or does again."""
    rate, bandwidth, launch = card.peak * given.matrix_rate, card.bytes * given.bandwidth, given.launch * 1e-6
    total = sum(max(operations / rate, size / bandwidth, launch) for operations, size in rows)
    done = sum(operations for operations, _ in rows)
    for work, causal in attention:
        # A row of several samples: within them half of the pairs is seen; a mask computes all of them.
        share = 1.0 if not causal or dense else 0.5 / given.samples
        kernel = given.masked_attention if causal and dense else given.attention
        total += max(work * share / (rate * kernel), launch)
        done += work * (0.5 / given.samples if causal else 1.0)
    return total, done


def main() -> None:
    """Print the estimate for each variant and card."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--generation", default="v4_5", choices=["v2", "v2_5", "v2_6", "v4", "v4_5"])
    add("--length", type=int, default=4096, help="tokens of the packed row")
    add("--samples", type=int, default=4, help="samples in the row")
    add("--slices", type=int, default=10, help="slices of the row's images")
    add("--cards", nargs="+", default=list(CARDS), choices=list(CARDS))
    add(
        "--matrix_rate",
        type=float,
        default=0.7,
        help="share of the data sheet's peak that matrix products reach",
    )
    add("--bandwidth", type=float, default=0.8, help="share of the data sheet's bandwidth that is reached")
    add("--launch", type=float, default=3.0, help="microseconds that an operator takes at least")
    add("--attention", type=float, default=0.5, help="share of the matrix rate that flash kernels reach")
    add("--masked_attention", type=float, default=0.25, help="the same of attention with a mask")
    given = parser.parse_args()
    from support.real_configs import write_config

    training = Training(
        zero=0, model_max_length=given.length, max_slice_nums=given.slices - 1, tune_vision=False,
        lora=LoraArguments(lora_modules_to_save=["resampler"]),
    )  # fmt: skip
    variants = {
        "dense mask, fp32 sums": (replace(training, fp32_residual_connection=True), True, False),
        "variable length, fp32 sums": (replace(training, fp32_residual_connection=True), False, False),
        "variable length, 16-bit sums": (training, False, False),
        "16-bit sums, liger": (training, False, True),
        "no checkpointing, 16-bit sums": (replace(training, gradient_checkpointing=False), False, False),
        "no checkpointing, liger": (replace(training, gradient_checkpointing=False), False, True),
    }
    print(
        f"AN ESTIMATE, nothing is measured: {given.generation}, LoRA and resampler, {given.samples} samples in a row"
    )
    print(
        f"of {given.length} tokens, {given.slices} slices. Matrix products at {given.matrix_rate:.0%} of the data "
        f"sheet, bandwidth at {given.bandwidth:.0%}, {given.launch:g} us a launch.\n"
    )
    print(
        f"{'variant':<32}{'card':<7}{'ms':>8}{'needed TFLOP':>14}{'of the sheet':>14}{'of the matrix rate':>20}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = write_config(given.generation, Path(name))
        found = {
            key: (*operators(folder, given.generation, how, fused=fused), dense)
            for key, (how, dense, fused) in variants.items()
        }
    # What is needed is what a step without checkpointing does; doing it again is not.
    rows, attention, _ = found["no checkpointing, 16-bit sums"]
    needed = seconds(CARDS[given.cards[0]], rows, attention, given, dense=False)[1]
    for key, (rows, attention, dense) in found.items():
        for name in given.cards:
            time, _ = seconds(CARDS[name], rows, attention, given, dense=dense)
            rate = needed / time / CARDS[name].peak
            print(
                f"{key:<32}{name:<7}{time * 1e3:>8.0f}{needed / 1e12:>14.1f}{rate:>14.0%}"
                f"{rate / given.matrix_rate:>20.0%}"
            )


if __name__ == "__main__":
    main()

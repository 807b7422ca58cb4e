"""How far it goes, on paper: time and cost of a million samples, and how throughput grows with GPUs and nodes.

    python benchmarks/how_far.py [--generation v4_5] [--peak 790] [--share 0.45] [--dollars 3] [--link 400]

Nothing here is measured. Operations are counted by step_flops.py from the released sizes; what a GPU does per
second is an assumption (``--peak`` TFLOP/s of bf16 matrix products x ``--share`` of it that a step reaches), as
are the links: ``--inside`` GB/s between GPUs of a node and ``--link`` Gbit/s per GPU between nodes.

Bytes that each GPU sends per optimizer step, N being the number of GPUs, P all parameters, T those that train:

    DDP     2 x 4 T (N - 1) / N         all-reduce of fp32 gradients
    ZeRO-2  (2 a + 2) T (N - 1) / N     reduce-scatter of bf16 gradients in each of a micro-batches, all-gather
                                        of the updated weights
    ZeRO-3  (4 P + 2 T) a (N - 1) / N   weights gathered for forward and backward, gradients scattered

A step takes max(computing, sending) when the two overlap fully, and their sum when they do not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in ("finetune", "tests", "benchmarks"):
    sys.path.insert(0, str(ROOT / folder))

from step_flops import ModelShape, Trains, Work, needed_flops, shape_of_folder

GPUS_PER_NODE = 8
SLICE = 1024  # patches
# A document photo: overview and nine slices, 66 tokens each with its tags, a question, an answer of 150 tokens.
SAMPLE = Work(lengths=[10 * 66 + 40 + 150], patches=[SLICE] * 10, supervised=151)


@dataclass(frozen=True)
class Method:
    """A way of training.

    Attributes:
        trains: What trains.
        trained: Parameters that train.
    """

    trains: Trains
    trained: float


@dataclass(frozen=True)
class Machine:
    """What is assumed of the hardware.

    Attributes:
        flops: Needed operations that a GPU does per second.
        inside: Bytes per second that a GPU sends inside its node.
        link: Bytes per second that a GPU sends to other nodes.
    """

    flops: float
    inside: float
    link: float

    def bandwidth(self, gpus: int) -> float:
        """Bytes per second of a ring over so many GPUs: that of its slowest link."""
        return self.inside if gpus <= GPUS_PER_NODE else min(self.inside, self.link)


def methods(shape: ModelShape, rank: int = 64) -> dict[str, Method]:
    """LoRA of the attention alone, LoRA with what the official script trains beside it, and full tuning."""
    resampler = shape.resampler_first + shape.resampler_patch + 2 * shape.resampler_query
    lora = lora_parameters(shape, rank)
    embeddings = shape.head
    return {
        "plain LoRA": Method(Trains(False, False, False, lora), lora),
        "LoRA, resampler, embeddings": Method(
            Trains(False, True, False, lora), lora + resampler + embeddings
        ),
        "full, frozen vision": Method(Trains(False, True, True), shape.llm + 2 * shape.head + resampler),
    }


def lora_parameters(shape: ModelShape, rank: int) -> int:
    """Parameters of adapters on q, k, v and o, from the widths that the count of operations holds."""
    layers, query, key = shape.layers, shape.llm_attention // shape.layers, shape.key_width
    return layers * rank * (2 * (shape.width + query) + 2 * (shape.width + key))


def sent_bytes(stage: str, *, parameters: float, trained: float, gpus: int, micro_batches: int) -> float:
    """Bytes that each GPU sends per optimizer step; the formulas are in the module's docstring."""
    if stage == "DDP":
        volume = 2 * 4 * trained
    elif stage == "ZeRO-2":
        volume = (2 * micro_batches + 2) * trained
    else:
        volume = (4 * parameters + 2 * trained) * micro_batches
    return volume * (gpus - 1) / gpus


def step_seconds(computing: float, sending: float) -> tuple[float, float]:
    """Seconds of a step with full overlap, and with none."""
    return max(computing, sending), computing + sending


def report(shape: ModelShape, machine: Machine, *, dollars: float, per_step: int, micro_batches: int) -> str:
    """The tables."""
    parameters = shape.parameters
    lines = [
        f"{'method':<30}{'TFLOP/sample':>13}{'samples/s':>11}{'1 GPU':>9}{'8 GPUs':>9}{'cost of 1M':>12}"
    ]
    for name, method in methods(shape).items():
        needed = sum(needed_flops(shape, SAMPLE, method.trains).values())
        rate = machine.flops / needed
        hours = 1e6 / rate / 3600
        lines.append(
            f"{name:<30}{needed / 1e12:>13.1f}{rate:>11.2f}{hours:>7.0f} h{hours / 8:>7.0f} h"
            f"{hours * dollars:>10,.0f} $"
        )
    lines += [
        "",
        f"{'method':<30}{'stage':<8}{'GPUs':>5}{'GB sent':>9}{'sending':>10}{'computing':>11}{'efficiency':>16}",
    ]
    for name, method in methods(shape).items():
        needed = sum(needed_flops(shape, SAMPLE, method.trains).values())
        computing = per_step * needed / machine.flops
        for stage in ("DDP", "ZeRO-2", "ZeRO-3"):
            for gpus in (8, 64):
                volume = sent_bytes(
                    stage,
                    parameters=parameters,
                    trained=method.trained,
                    gpus=gpus,
                    micro_batches=micro_batches,
                )
                sending = volume / machine.bandwidth(gpus)
                best, worst = (computing / seconds for seconds in step_seconds(computing, sending))
                lines.append(
                    f"{name:<30}{stage:<8}{gpus:>5}{volume / 1e9:>9.2f}{sending:>8.2f} s{computing:>9.2f} s"
                    f"{worst:>9.0%} to {best:.0%}"
                )
    return "\n".join(lines)


def main() -> None:
    """Print the tables for one model and one set of assumptions."""
    parser = argparse.ArgumentParser(description="Time, cost and scaling on paper.")
    parser.add_argument("--generation", default="v4_5", choices=["v2_5", "v2_6", "v4", "v4_5"])
    parser.add_argument("--peak", type=float, default=790, help="TFLOP/s of bf16 matrix products (H200)")
    parser.add_argument("--share", type=float, default=0.45, help="share of the peak that a step reaches")
    parser.add_argument("--dollars", type=float, default=3, help="price of a GPU hour")
    parser.add_argument("--inside", type=float, default=300, help="GB/s that a GPU sends inside its node")
    parser.add_argument("--link", type=float, default=400, help="Gbit/s that a GPU sends to other nodes")
    parser.add_argument("--samples", type=int, default=16, help="samples of a GPU per optimizer step")
    parser.add_argument("--micro_batches", type=int, default=4, help="of an optimizer step")
    given = parser.parse_args()
    from support.real_configs import write_config

    with tempfile.TemporaryDirectory() as name:
        shape = shape_of_folder(write_config(given.generation, Path(name)))
    machine = Machine(given.peak * 1e12 * given.share, given.inside * 1e9, given.link * 1e9 / 8)
    print(
        f"{given.generation}: assumed {given.peak:g} TFLOP/s x {given.share:.0%}, {given.dollars:g} $ per GPU hour,"
    )
    print(
        f"{given.inside:g} GB/s inside a node, {given.link:g} Gbit/s per GPU between nodes of {GPUS_PER_NODE} GPUs;"
    )
    print(
        f"{given.samples} samples of a GPU per step in {given.micro_batches} micro-batches. Nothing is measured.\n"
    )
    print(
        report(
            shape, machine, dollars=given.dollars, per_step=given.samples, micro_batches=given.micro_batches
        )
    )


if __name__ == "__main__":
    main()

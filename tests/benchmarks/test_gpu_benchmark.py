"""benchmarks/gpu.py without a GPU: what it counts, what it reads off the clock, and that it runs."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gpu_run import busy_seconds, work_of
from make_checkpoint import make_checkpoint
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.models.loading import load_model
from minicpm_tune.models.parameter_parts import freeze
from step_flops import Trains, Work, needed_flops, shape_of, shape_of_folder
from support import processes
from support.paths import BENCHMARKS
from support.real_configs import write_config

COUNT_TOLERANCE = 0.01  # 0.0072: the resampler's product of its Q queries, once per batch, is not counted
LENGTH, SLICES, GRID, SUPERVISED = 96, 2, (8, 8), 40


def batch(queries):
    bounds = [[0, 1 + index * (queries + 2), 1 + index * (queries + 2) + queries] for index in range(SLICES)]
    labels = torch.full((1, LENGTH), -100)
    labels[0, -SUPERVISED:] = 5
    return {
        "input_ids": torch.full((1, LENGTH), 7),
        "labels": labels,
        "pixel_values": torch.zeros(3, 14, 14 * SLICES * GRID[0] * GRID[1], dtype=torch.uint8),
        "tgt_sizes": torch.tensor([GRID] * SLICES),
        "image_bound": torch.tensor(bounds),
    }


@pytest.mark.parametrize(
    "trains",
    [Trains(True, True, True), Trains(False, True, True), Trains(False, False, True)],
    ids=["all", "frozen vision", "LLM alone"],
)
@pytest.mark.parametrize("generation", ["v2", "v2_6", "v4_5"])
def test_the_counted_operations_are_those_that_torch_counts(tmp_path, generation, trains):
    row = GENERATIONS[generation]
    model = load_model(make_checkpoint(tmp_path, generation, size="tiny"), dtype=torch.float32).train()
    freeze(model, row, vision=trains.vision, resampler=trains.resampler, llm=trains.llm)
    shape = shape_of(model)
    with FlopCounterMode(display=False) as counter:
        model(**batch(shape.queries)).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    counted = sum(count for kind, count in counts.items() if str(kind) in ("aten.mm", "aten.addmm"))
    products = replace(shape, llm_attention=0, vision_attention=0, width=0)  # attention is tested by itself
    work = Work([LENGTH], [GRID[0] * GRID[1]] * SLICES, SUPERVISED)
    needed = sum(needed_flops(products, work, trains).values())
    print(f"\n{generation}: {counted / needed - 1:+.4f}")
    assert abs(counted / needed - 1) < COUNT_TOLERANCE


def test_attention_counts_the_pairs_that_the_masks_let_through():
    empty = dict.fromkeys(
        ("llm", "head", "stem", "vision", "resampler_first", "resampler_patch", "resampler_query"), 0
    )
    shape = SimpleNamespace(**empty, llm_attention=6, vision_attention=5, width=7, queries=4)
    found = needed_flops(shape, Work([10, 20], [3], 0), Trains(False, True, False))
    pairs = {"LLM": (100 + 400) / 2 * 6, "vision": 9 * 5, "resampler": 4 * 3 * 7}
    backward = {"LLM": 2, "vision": 0, "resampler": 2}
    assert found == {"loss": 0} | {part: 4 * count * (1 + backward[part]) for part, count in pairs.items()}


def test_the_shapes_of_the_released_models_follow_from_their_configurations(tmp_path):
    shape = shape_of_folder(write_config("v2_6", tmp_path))
    assert shape.llm == 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert shape.head == 151666 * 3584
    assert shape.llm_attention == 28 * 28 * 128
    assert shape.vision == 27 * (4 * 1152**2 + 2 * 1152 * 4304)
    assert shape.stem == 588 * 1152
    assert shape.vision_attention == 27 * 1152
    assert shape.queries == 64


def test_a_frozen_layer_of_a_lora_run_needs_no_gradient_of_its_weights():
    shape = SimpleNamespace(
        llm=1000, head=0, llm_attention=0, stem=0, vision=0, vision_attention=0, resampler_first=0, resampler_patch=0,
        resampler_query=0, width=0, queries=0,
    )  # fmt: skip
    work = Work([10], [], 0)
    assert needed_flops(shape, work, Trains(False, False, False, lora=50))["LLM"] == 10 * (4 * 1000 + 6 * 50)
    assert needed_flops(shape, work, Trains(False, False, True))["LLM"] == 10 * 6 * 1000


def test_the_work_of_a_packed_batch_is_that_of_its_samples():
    found = work_of(
        {
            "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]),
            "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]),
            "tgt_sizes": np.array([[2, 3], [4, 4]]),
            "supervised": np.arange(4),
        }
    )
    assert found == Work([3, 2, 6], [6, 16], 4)


def test_kernels_that_run_at_the_same_time_are_busy_once():
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    spans = [(0, 10, cuda), (5, 20, cuda), (30, 40, cuda), (12, 15, cuda), (0, 100, cpu)]
    events = [
        SimpleNamespace(time_range=SimpleNamespace(start=start, end=end), device_type=kind)
        for start, end, kind in spans
    ]
    assert busy_seconds(events) == pytest.approx(30e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "method"), [("v2_6", "qlora"), ("v4_5", "full")])
def test_it_runs_with_small_models_on_the_cpu(tmp_path, model, method):
    report = tmp_path / "report.json"
    command = [
        sys.executable, str(BENCHMARKS / "gpu.py"), "--small", "--models", model, "--methods", method,
        "--lengths", "512", "--batch_sizes", "1", "--packing", "true", "--steps", "2", "--warmup", "1",
        "--json", str(report),
    ]  # fmt: skip
    done = processes.run(command, limit=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (row,) = json.loads(report.read_text())
    assert row["tokens_per_second"] > 0
    assert 0 < row["mfu"] < 1.5
    wanted = {"vision forward", "LLM forward", "LLM backward", "loss", "optimizer", "data"}
    assert wanted <= row["shares"].keys()
    assert row["shares"]["LLM backward"] > row["shares"]["loss"] > 0

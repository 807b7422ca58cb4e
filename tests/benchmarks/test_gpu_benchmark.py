"""benchmarks/gpu.py without a GPU: what it counts, what it reads off the clock, and that it runs."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import gpu_run
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


class Moment:
    """A CUDA event: a point on a device's time line, here a count of all that were recorded."""

    recorded = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Moment.recorded += 1
        self.at = Moment.recorded

    def elapsed_time(self, other):
        return 1000.0 * (other.at - self.at)


def test_memory_kernels_and_phases_are_read_off_a_gpu(monkeypatch):
    """On a stand-in for torch.cuda: what only runs on a GPU runs here once."""
    gib = 2**30
    for name, value in {
        "synchronize": lambda: None, "reset_peak_memory_stats": lambda: None, "max_memory_allocated": lambda: gib,
        "max_memory_reserved": lambda: 2 * gib, "get_device_name": lambda: "a card", "Event": Moment,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu_run, "matrix_peak", lambda *, on_gpu: 1e12)
    cuda = torch.autograd.DeviceType.CUDA
    kernel = SimpleNamespace(
        name="gemm", time_range=SimpleNamespace(start=0, end=0.5), device_type=cuda
    )  # of a microsecond
    profiler = SimpleNamespace(
        __enter__=lambda: None, __exit__=lambda *_: None, events=lambda: [kernel, kernel]
    )
    asked = []
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: asked.append(activities) or profiler)

    lm_head = torch.nn.Identity()
    llm = SimpleNamespace(model=torch.nn.Identity(), lm_head=lm_head)
    model = SimpleNamespace(vpm=torch.nn.Identity(), resampler=torch.nn.Identity(), llm=llm)
    trainer = SimpleNamespace(
        model=model,
        training_step=lambda model, inputs: lm_head(torch.ones(1)),
        get_batch_samples=lambda: [],
        add_callback=lambda callback: None,
    )
    bench = gpu_run.Bench(trainer, {"warmup": 1, "steps": 2, "checkpointing": True}, on_gpu=True)
    inputs = {
        "attention_mask": torch.ones(1, 6), "tgt_sizes": np.array([[2, 3], [2, 3]]), "supervised": np.arange(4),
        "provenance": SimpleNamespace(rows=[7]),
    }  # fmt: skip
    for step in range(1, 1 + 2 + gpu_run.PROFILED + 1):
        trainer.get_batch_samples()
        trainer.training_step(model, inputs)
        bench.on_step_end(None, SimpleNamespace(global_step=step), None)
    found = bench.result(lambda work: 1e12)
    assert asked == [[torch.profiler.ProfilerActivity.CUDA]]
    assert (found["device"], found["peak_gib"], found["reserved_gib"]) == ("a card", 1.0, 2.0)
    assert found["kernels"] == [{"name": "gemm", "seconds": pytest.approx(1e-6), "share": 1.0, "calls": 2}]
    assert 0 < found["idle"] < 1
    assert found["shares"].keys() == {"other", "data", "loss"}
    assert bench.largest == {"rows": 1, "tokens": 6, "slices": 2, "checkpointing": 1}

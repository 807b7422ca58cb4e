"""One row of gpu.py: finetune.py's own steps around a model with random weights, measured."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from finetune import build_trainer, choose_what_trains, read_data
from make_checkpoint import make_checkpoint
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.data.samples import load_processing
from minicpm_tune.models.minicpmv.configuration import MiniCPMVConfig
from minicpm_tune.models.minicpmv.modeling import MiniCPMV
from minicpm_tune.models.parameter_parts import count_parts
from minicpm_tune.settings.arguments import parse_arguments
from minicpm_tune.training.peer_monitor import PeerMonitor
from minicpm_tune.training.resilient_trainer import RunContext
from phase_clock import PhaseClock
from step_flops import Trains, Work, needed_flops, shape_of
from support.real_configs import REAL_CONFIGS

PROFILED = 2  # steps under torch.profiler
GIB = 1024**3


def measure(wish: dict[str, Any]) -> dict[str, Any]:
    """Train a few steps; give speed, memory and shares of time.

    Args:
        wish: One combination of gpu.py's flags.
    """
    folder = Path(wish["folder"])
    checkpoint = write_checkpoint(folder / wish["model"], wish["model"], small=wish["small"])
    on_gpu = torch.cuda.is_available()
    arguments = parse_arguments(_argv(wish, checkpoint, on_gpu=on_gpu))
    model_args, data_args, training, lora = arguments
    processing = load_processing(checkpoint, data_args)
    datasets = read_data(arguments, processing)
    set_seed(training.seed)
    generation = processing.generation
    device = "cuda" if on_gpu else "cpu"
    bits = lora.held_bits
    model = random_model(
        checkpoint, training.weight_dtype, device, bits=bits, attention=model_args.attn_implementation
    )
    shape = shape_of(model) if bits is None else None
    if wish.get("dense_mask"):
        model.llm.config._attn_implementation = "sdpa"  # transformers' own, with a mask over all tokens
    model = choose_what_trains(arguments, model, generation, None)  # all layers or none
    counts = count_parts(model, generation)
    context = RunContext(peers=PeerMonitor(limit=training.ddp_timeout), owns_folder=True)
    trainer = build_trainer(arguments, model, checkpoint, processing, datasets, context)
    bench = Bench(trainer, wish, on_gpu=on_gpu)
    trainer.train()
    lora_size = counts["lora"].total if "lora" in counts else 0
    trains = Trains(training.tune_vision, training.tune_resampler, training.tune_llm, lora_size)
    shape = shape or _shape_unquantized(checkpoint)
    found = bench.result(lambda work: sum(needed_flops(shape, work, trains).values()))
    if wish.get("plan"):
        found["plan_gib"] = _planned(checkpoint, arguments, bench.largest)
    return found


def _planned(checkpoint: Path, arguments: Any, largest: dict[str, int]) -> dict[str, float]:
    """What plan_memory.py says of the same run, part by part, for the largest batch that was trained on."""
    from minicpm_tune.planning.memory_plan import OPTIMIZERS, Training, plan

    _, _, training, lora = arguments
    method = "full" if not training.use_lora else "qlora" if lora.held_bits else "lora"
    asked = Training(
        method=method, zero=0, model_max_length=largest["tokens"], batch_size=largest["rows"],
        max_slice_nums=largest["slices"] - 1, tune_vision=training.tune_vision,
        tune_resampler=training.tune_resampler, precision="bf16" if training.bf16 else "fp32",
        gradient_checkpointing=largest["checkpointing"] == 1, lora=lora,
        optim=training.optim if training.optim in OPTIMIZERS else "adamw_torch",
    )  # fmt: skip
    parts = plan(checkpoint, asked)
    return {part: size / GIB for part, size in parts.items()} | {"total": sum(parts.values()) / GIB}


def write_checkpoint(folder: Path, name: str, *, small: bool) -> Path:
    """A folder with tokenizer and configuration, the latter in the released sizes unless ``small``."""
    if (folder / "config.json").is_file():
        return folder
    make_checkpoint(folder, name, size="tiny")
    if small:
        return folder
    config = json.loads((folder / "config.json").read_text()) | REAL_CONFIGS[name]
    config["slice_config"] = {"max_slice_nums": 9, "patch_size": 14, "scale_resolution": 448}
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "preprocessor_config.json"
    if path.is_file():
        settings = {"scale_resolution": 448, "image_feature_size": config["query_num"]}
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def random_model(
    folder: Path, dtype: torch.dtype, device: str, *, bits: int | None, attention: str
) -> MiniCPMV:
    """The model of a configuration, made on the device."""
    config = MiniCPMVConfig.from_pretrained(folder)
    config._attn_implementation = attention
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = MiniCPMV(config)
    finally:
        torch.set_default_dtype(before)
    if bits is not None:
        _quantize(model, bits, dtype)
    return model.train()


def _quantize(model: MiniCPMV, bits: int, dtype: torch.dtype) -> None:
    """Hold the linear layers of the LLM's blocks as ``--q_lora true`` holds them."""
    import bitsandbytes

    assert bits == 4, "gpu.py measures 4 bit"
    for name, linear in list(model.llm.model.named_modules()):
        if type(linear) is not torch.nn.Linear:
            continue
        bias = linear.bias is not None
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=bias,
            compute_dtype=dtype,
            quant_type="nf4",
            device="meta",
        )
        weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        layer.weight = weight.to(linear.weight.device)
        layer.bias = linear.bias
        layer.support_avx512bf16_for_cpu = False
        model.llm.model.set_submodule(name, layer)
    model.is_loaded_in_4bit = True


def _shape_unquantized(folder: Path) -> Any:
    from minicpm_tune.planning.step_memory import build_on_meta

    return shape_of(build_on_meta(folder, GENERATIONS[folder.name]))


def _argv(wish: dict[str, Any], checkpoint: Path, *, on_gpu: bool) -> list[str]:
    steps = wish["warmup"] + wish["steps"] + PROFILED
    words: list[Any] = [
        "--model_name_or_path", checkpoint, "--data_path", Path(wish["folder"]) / wish.get("data", "rows.json"),
        "--output_dir", Path(wish["folder"]) / "out", "--overwrite_output_dir", "true", "--max_steps", steps,
        "--per_device_train_batch_size", wish["batch"], "--model_max_length", wish["length"],
        "--packing", str(wish["packing"]).lower(), "--bf16", str(on_gpu or wish.get("bf16", False)).lower(),
        "--report_to", "none",
        "--save_strategy", "no", "--logging_steps", 10_000, "--learning_rate", 1e-6, "--check_images", "header",
        "--activation_checkpointing", str(wish["checkpointing"]).lower(), *wish["flags"],
    ]  # fmt: skip
    return [str(word) for word in words]


class Bench(TrainerCallback):
    """Measures the steps of a trainer between warm-up and profile.

    Args:
        trainer: The trainer.
        wish: One combination of gpu.py's flags.
        on_gpu: Whether it trains on a GPU.
    """

    def __init__(self, trainer: Any, wish: dict[str, Any], *, on_gpu: bool) -> None:
        self.trainer, self.wish, self.on_gpu = trainer, wish, on_gpu
        self.clock = PhaseClock(on_gpu=on_gpu)
        model = trainer.model
        self.clock.watch(model.get_base_model() if hasattr(model, "get_base_model") else model)
        self.works: list[dict[str, Any]] = []
        self.phases: Counter[str] = Counter()
        self.seconds = self.data_seconds = 0.0
        self.idle: float | None = None
        self.memory: dict[str, float | None] = {"peak_gib": None, "reserved_gib": None}
        self.kernels: list[dict[str, Any]] = []
        self._step, self._load = trainer.training_step, trainer.get_batch_samples
        trainer.training_step, trainer.get_batch_samples = self._training_step, self._get_batch_samples
        trainer.add_callback(self)

    def _training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        if self.clock.running:
            kept = ("attention_mask", "position_ids", "tgt_sizes", "supervised", "provenance")
            self.works.append({name: inputs[name] for name in kept if name in inputs})
        loss = self._step(model, inputs, *rest, **named)
        self.clock.mark("other")
        return loss

    def _get_batch_samples(self, *args: Any, **named: Any) -> Any:
        start = time.perf_counter()
        self.clock.mark("data")
        found = self._load(*args, **named)
        self.clock.mark("other")
        self.data_seconds += time.perf_counter() - start
        return found

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin after the warm-up; end, and profile, after the measured steps."""
        first, last = self.wish["warmup"], self.wish["warmup"] + self.wish["steps"]
        if state.global_step == first:
            self._wait()
            if self.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            self._begin, self.data_seconds = time.perf_counter(), 0.0
            self.clock.start()
        elif state.global_step == last:
            self.phases = self.clock.stop()
            self._wait()
            self.seconds = time.perf_counter() - self._begin
            self.waited = self.data_seconds
            if self.on_gpu:
                self.memory = {
                    "peak_gib": torch.cuda.max_memory_allocated() / GIB,
                    "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
                }
            kind = "CUDA" if self.on_gpu else "CPU"
            activity = getattr(torch.profiler.ProfilerActivity, kind)
            self._profiler = torch.profiler.profile(activities=[activity])
            self._profiler.__enter__()
            self._begin = time.perf_counter()
        elif state.global_step == last + PROFILED:
            self._wait()
            wall = time.perf_counter() - self._begin
            self._profiler.__exit__(None, None, None)
            events = self._profiler.events()
            self.kernels = longest_kernels(events, on_gpu=self.on_gpu)
            self.idle = 1 - busy_seconds(events) / wall if self.on_gpu else None

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    @property
    def largest(self) -> dict[str, int]:
        """The most rows, tokens of a row, and slices of a row that a measured batch had."""
        shapes = [batch["attention_mask"].shape for batch in self.works]
        return {
            "rows": max(rows for rows, _ in shapes),
            "tokens": max(tokens for _, tokens in shapes),
            "slices": max(len(batch["tgt_sizes"]) // len(batch["attention_mask"]) for batch in self.works),
            "checkpointing": int(self.wish["checkpointing"]),
        }

    def result(self, flops_of: Any) -> dict[str, Any]:
        """The row's figures."""
        works = [work_of(batch) for batch in self.works]
        tokens = sum(sum(work.lengths) for work in works)
        places = sum(batch["attention_mask"].numel() for batch in self.works)
        samples = sum(row is not None for batch in self.works for row in batch["provenance"].rows)
        flops, peak = sum(flops_of(work) for work in works), matrix_peak(on_gpu=self.on_gpu)
        rate = flops / self.seconds
        total = sum(self.phases.values())
        shares = {name: seconds / total for name, seconds in self.phases.items()}
        return {
            "device": torch.cuda.get_device_name() if self.on_gpu else f"CPU, {os.cpu_count()} cores",
            "torch": torch.__version__,
            "steps": self.wish["steps"],
            "seconds": self.seconds,
            "tokens_per_second": tokens / self.seconds,
            "samples_per_second": samples / self.seconds,
            "padding": 1 - tokens / places,
            "tflops": rate / 1e12,
            "peak_tflops": peak / 1e12,
            "mfu": rate / peak,
            **self.memory,
            "idle": self.idle,
            "kernels": self.kernels,
            "shares": shares | {"data": self.waited / self.seconds},
        }


def work_of(batch: dict[str, Any]) -> Work:
    """What a batch puts through the model."""
    mask = batch["attention_mask"].cpu()
    counts = mask.sum(dim=1).tolist()
    if "position_ids" not in batch:
        lengths = counts
    else:
        lengths = []
        for positions, count in zip(batch["position_ids"].cpu(), counts, strict=True):
            starts = (positions[:count] == 0).nonzero()[:, 0].tolist()
            lengths += [end - start for start, end in zip(starts, [*starts[1:], count], strict=True)]
    patches = [int(rows) * int(columns) for rows, columns in batch["tgt_sizes"]]
    return Work(lengths, patches, len(batch["supervised"]))


def busy_seconds(events: Any) -> float:
    """Time in which at least one kernel or copy ran."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, reached = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / 1e6


def longest_kernels(events: Any, *, on_gpu: bool, count: int = 15) -> list[dict[str, Any]]:
    """The kernels (on the CPU: operations) that took most time in the profiled steps, with how often they ran."""
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        if event.device_type == kind:
            seconds[event.name] += (event.time_range.end - event.time_range.start) / 1e6
            calls[event.name] += 1
    total = sum(seconds.values())
    return [
        {"name": name, "seconds": spent, "share": spent / total, "calls": calls[name]}
        for name, spent in seconds.most_common(count)
    ]


def matrix_peak(*, on_gpu: bool, repeats: int = 20) -> float:
    """Operations per second of large matrix products, the median of the faster half: bf16 on a GPU, else fp32."""
    side, dtype, device = (8192, torch.bfloat16, "cuda") if on_gpu else (512, torch.float32, "cpu")
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        left @ right
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(sorted(seconds)[: repeats // 2])

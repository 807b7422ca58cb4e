"""What a run measures about itself: speed, token shares, memory, losses by source, evaluations, and ``loss.png``."""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from minicpm_tune.batch import IGNORE_INDEX
from minicpm_tune.files import GIB

logger = logging.getLogger(__name__)

_SUMMED = ("loss_sum", "weight_sum", "token_count", "correct_count")  # of a model's output


class ThroughputMeter:
    """Counts what went through the model; read once per log line.

    Sums stay on the device until they are read, so that counting never makes a step wait.
    """

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None
        self._slots = self._samples = 0
        self._since = time.perf_counter()

    def add(self, batch: dict[str, Any], *, samples: int) -> None:
        """Count one batch.

        Args:
            batch: ``attention_mask`` and ``labels`` [B, T].
            samples: Rows of the data set in it; padding samples are none.
        """
        found = torch.stack([batch["attention_mask"].sum(), (batch["labels"] != IGNORE_INDEX).sum()])
        self._sums = found if self._sums is None else self._sums + found
        self._slots += batch["labels"].numel()
        self._samples += samples

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Give the rates since the last call, over all processes, and start anew.

        Every process must call it: it sums over them.

        Returns:
            tokens_per_second and samples_per_second (real tokens, padding not counted),
            supervised_share and padding_share from 0 to 1, peak_memory_gib of this process.
        """
        if self._sums is None:
            return {}
        counts = torch.tensor([self._slots, self._samples], device=self._sums.device)
        counts = accelerator.reduce(torch.cat([self._sums, counts]), reduction="sum")
        tokens, supervised, slots, samples = counts.tolist()
        seconds = time.perf_counter() - self._since
        ThroughputMeter.__init__(self)
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "samples_per_second": round(samples / seconds, 2),
            "supervised_share": round(supervised / max(tokens, 1), 4),
            "padding_share": round(1 - tokens / max(slots, 1), 4),
            "peak_memory_gib": round(peak_memory_gib(), 3),
        }


class SourceLosses:
    """Adds up the training loss of every data file of a mixture; read once per log line.

    Args:
        names: The data files, by source number.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = _short(names)
        self._sums: torch.Tensor | None = None

    def add(self, token_losses: torch.Tensor, sources: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Count one batch.

        Args:
            token_losses: [N] fp32 cross entropies, in nats.
            sources: [N] int64, the source each supervised token comes from.
            weights: [N] float32, how much each counts; None: all alike.
        """
        if self._sums is None:
            self._sums = torch.zeros(len(self.names), 2, device=token_losses.device)
        index = torch.from_numpy(sources).to(token_losses.device, non_blocking=True)
        counted = torch.stack([token_losses, torch.ones_like(token_losses)], dim=1)
        if weights is not None:
            counted *= torch.from_numpy(weights).to(token_losses.device, non_blocking=True)[:, None]
        self._sums.index_add_(0, index, counted)

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Mean loss since the last call of every source that was seen, ``loss/<file>``, over all processes."""
        if self._sums is None:
            return {}
        sums = accelerator.reduce(self._sums, reduction="sum").tolist()
        self._sums = None
        return {
            f"loss/{name}": loss / tokens
            for name, (loss, tokens) in zip(self.names, sums, strict=True)
            if tokens
        }


class EvaluationSums:
    """Adds up an evaluation's counts.

    Trainer averages the losses of batches, which is wrong when they hold different numbers of supervised tokens.
    """

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def add(self, output: Mapping[str, torch.Tensor]) -> None:
        """Count one batch by the sums in a model's output, see ``models/loss.py``."""
        found = torch.stack([output[name].double() for name in _SUMMED])
        self._sums = found if self._sums is None else self._sums + found

    def read(self, accelerator: Accelerator, prefix: str) -> dict[str, float]:
        """The metrics over all processes, and start anew.

        Returns:
            ``<prefix>_loss`` (mean over supervised tokens by their weights, nats), ``<prefix>_token_accuracy`` and
            ``<prefix>_supervised_tokens``.
        """
        sums = self._sums
        if sums is None:
            sums = torch.zeros(len(_SUMMED), dtype=torch.float64, device=accelerator.device)
        loss_sum, weights, tokens, correct = accelerator.reduce(sums, reduction="sum").tolist()
        self._sums = None
        return {
            f"{prefix}_loss": loss_sum / weights if weights else 0.0,
            f"{prefix}_token_accuracy": correct / max(tokens, 1),
            f"{prefix}_supervised_tokens": int(tokens),
        }


def _short(names: Sequence[str]) -> list[str]:
    """File names without their folders, numbered where two are alike."""
    stems = [Path(name).name for name in names]
    return [f"{number}:{stem}" if stems.count(stem) > 1 else stem for number, stem in enumerate(stems)]


def peak_memory_gib() -> float:
    """Most memory in use so far: allocated on the GPU, or resident in the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


CURVE_FILE = "loss.png"
_SHARE = 0.01  # of the run's time that drawing may take
_SOONEST = 30.0  # seconds between two drawings
_SMOOTHING = 0.05  # of the running mean: how much of it each new loss is


class LossCurve(TrainerCallback):
    """Draws on rank 0: after the first log line, then rarely enough to take less than one percent of the time."""

    def __init__(self) -> None:
        self._next = 0.0

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and time.monotonic() >= self._next:
            self._draw(args, state)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._draw(args, state)

    def _draw(self, args: Any, state: TrainerState) -> None:
        start = time.monotonic()
        try:
            draw_losses(state.log_history, Path(args.output_dir) / CURVE_FILE)
        except OSError as error:  # a picture is no reason to end a run
            logger.warning("%s was not drawn: %s", CURVE_FILE, error)
        end = time.monotonic()
        self._next = end + max(_SOONEST, (end - start) / _SHARE)


def draw_losses(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw training and evaluation losses over steps.

    Args:
        history: ``TrainerState.log_history``.
        path: The PNG file; it is replaced in one go, so that a viewer never sees half a picture.
    """
    # Imported here: half a second, and only rank 0 draws.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="tight")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    train, evaluated = points(history, "loss"), points(history, "eval_loss")
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, linewidth=0.8, alpha=0.45, label="training")
        axes.plot(steps, running_mean(losses), linewidth=1.6, label="training, running mean")
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), marker="o", label="evaluation")
    axes.set(xlabel="step", ylabel="loss (nats per supervised token)")
    axes.grid(visible=True, alpha=0.3)
    if train or evaluated:
        axes.legend()
    partial = path.with_name(f".{path.name}.partial")
    canvas.print_png(str(partial))
    partial.replace(path)


def points(history: Sequence[dict[str, Any]], name: str, factor: float = 1) -> list[tuple[float, float]]:
    """(step, factor x value) of every log line that has a finite value of this name."""
    return [
        (line["step"], line[name] * factor)
        for line in history
        if isinstance(line.get(name), (int, float)) and math.isfinite(line[name])
    ]


def running_mean(values: Sequence[float]) -> list[float]:
    """Running mean that starts at the plain mean of what there is."""
    smooth, mean = [], 0.0
    for count, value in enumerate(values, start=1):
        mean += max(_SMOOTHING, 1 / count) * (value - mean)
        smooth.append(mean)
    return smooth

"""``loss.png``: the losses so far, redrawn while training."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

logger = logging.getLogger(__name__)

CURVE_FILE = "loss.png"
_SHARE = 0.01  # of the run's time that drawing may take
_SOONEST = 30.0  # seconds between two drawings
_SMOOTHING = 0.05  # of the running mean: how much of it each new loss is


class LossCurve(TrainerCallback):
    """Draws on rank 0: after the first log line, then rarely enough to take less than one percent of the time."""

    def __init__(self) -> None:
        self._next = 0.0

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and time.monotonic() >= self._next:
            self._draw(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._draw(args, state)

    def _draw(self, args: TrainingArguments, state: TrainerState) -> None:
        assert args.output_dir is not None  # transformers has put its default there
        start = time.monotonic()
        try:
            draw_losses(state.log_history, Path(args.output_dir) / CURVE_FILE)
        except OSError as error:  # a picture is no reason to end a run
            logger.warning("%s was not drawn: %s", CURVE_FILE, error)
        end = time.monotonic()
        self._next = end + max(_SOONEST, (end - start) / _SHARE)


def draw_losses(history: list[dict[str, float]], path: Path) -> None:
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
    train = [(line["step"], line["loss"]) for line in history if math.isfinite(line.get("loss", math.nan))]
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, linewidth=0.8, alpha=0.45, label="training")
        axes.plot(steps, _smooth(losses), linewidth=1.6, label="training, running mean")
    evaluated = [
        (line["step"], line["eval_loss"])
        for line in history
        if math.isfinite(line.get("eval_loss", math.nan))
    ]
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), marker="o", label="evaluation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per supervised token)")
    axes.grid(visible=True, alpha=0.3)
    if train or evaluated:
        axes.legend()
    partial = path.with_name(f".{path.name}.partial")
    canvas.print_png(str(partial))
    partial.replace(path)


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Running mean that starts at the plain mean of what there is."""
    smooth, mean = [], 0.0
    for count, value in enumerate(values, start=1):
        mean += max(_SMOOTHING, 1 / count) * (value - mean)
        smooth.append(mean)
    return smooth

"""What a run is going to do, said before any weights are loaded: rows, steps, and when the first results come."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from minicpm_tune.data.samples import TrainingRows
from minicpm_tune.settings.arguments import TrainingArguments

logger = logging.getLogger(__name__)

MANY_EPOCHS = 20  # more than this is rarely meant


@dataclass(frozen=True)
class RunPlan:
    """The length of a run.

    Attributes:
        samples: Samples of one epoch.
        left_out: Rows that can't be used and are left out.
        tokens: Tokens of the first epoch.
        steps_per_epoch: Optimizer steps of one epoch; with packing an estimate from the tokens.
        steps: Optimizer steps of the run.
    """

    samples: int
    left_out: int
    tokens: int
    steps_per_epoch: int
    steps: int

    @property
    def epochs(self) -> float:
        """How often every sample is seen."""
        return self.steps / self.steps_per_epoch


def plan_run(training: TrainingArguments, data: TrainingRows) -> RunPlan:
    """Work out how long a run is, as Trainer will.

    Args:
        training: The arguments.
        data: The training rows, checked.
    """
    assert data.lengths is not None  # check_rows has counted them
    tokens = int(data.lengths[data.mixture.epoch_order(seed=training.seed, epoch=0)].sum())
    rows = samples = data.mixture.samples
    if training.packing and training.model_max_length:
        rows = min(samples, math.ceil(tokens / training.model_max_length))
    batches = math.ceil(rows / (training.per_device_train_batch_size * training.world_size))
    steps_per_epoch = max(math.ceil(batches / training.gradient_accumulation_steps), 1)
    steps = training.max_steps
    if steps <= 0:
        steps = math.ceil(training.num_train_epochs * steps_per_epoch)
    return RunPlan(samples, len(data.left_out), tokens, steps_per_epoch, steps)


def log_plan(plan: RunPlan, training: TrainingArguments) -> None:
    """Log the plan, and warn of a length or of intervals that can hardly be meant."""
    for line in plan_lines(plan, training):
        logger.info("%s", line)
    level = logging.WARNING if training.process_index == 0 else logging.INFO  # all know, one says it
    for text in warnings(plan, training):
        logger.log(level, "%s", text)


def plan_lines(plan: RunPlan, training: TrainingArguments) -> list[str]:
    """The plan in words."""
    left_out = f" ({plan.left_out:,} rows can't be used and are left out)" if plan.left_out else ""
    about = "about " if training.packing else ""
    return [
        f"Data: {plan.samples:,} samples an epoch, {plan.tokens:,} tokens{left_out}.",
        f"Run: {plan.steps:,} steps = {about}{plan.epochs:.3g} epochs at learning rate {training.learning_rate:g}; "
        f"{_first(training, plan, 'eval', 'evaluation')}, {_first(training, plan, 'save', 'checkpoint')}.",
        f"Everything is written to {training.output_dir}.",
    ]


def warnings(plan: RunPlan, training: TrainingArguments) -> list[str]:
    """What of a plan can hardly be meant."""
    found = []
    if plan.epochs > MANY_EPOCHS:
        found.append(
            f"{plan.steps:,} steps see each of the {plan.samples:,} samples {plan.epochs:.0f} times. With a small data "
            "set use EPOCHS=3 (or --num_train_epochs 3) and, as the steps are few, a higher LEARNING_RATE, such as "
            "1e-5 (full) or 1e-4 (LoRA)."
        )
    if (first := _first_step(training, plan, "save")) is not None and first > plan.steps:
        found.append(
            f"The first checkpoint would come after {first:,} steps, but the run ends after {plan.steps:,}: until then "
            "an interruption loses everything. Set SAVE_STEPS (or --save_steps) lower."
        )
    if (first := _first_step(training, plan, "eval")) is not None and first > plan.steps:
        found.append(
            f"The first evaluation would come after {first:,} steps, but the run ends after {plan.steps:,}. Set "
            "EVAL_STEPS (or --eval_steps) lower."
        )
    return found


def _first_step(training: TrainingArguments, plan: RunPlan, what: str) -> int | None:
    """The step of the first evaluation or checkpoint; None when there is none, or when the best model decides."""
    strategy, every = getattr(training, f"{what}_strategy"), getattr(training, f"{what}_steps")
    if strategy == "epoch":
        return plan.steps_per_epoch
    if strategy != "steps":
        return None
    return math.ceil(every * plan.steps) if every < 1 else int(every)


def _first(training: TrainingArguments, plan: RunPlan, what: str, noun: str) -> str:
    first = _first_step(training, plan, what)
    if first is not None:
        return f"first {noun} after step {first:,}"
    if getattr(training, f"{what}_strategy") == "best":
        return f"first {noun} after the first evaluation"
    return f"no {noun} before the end" if what == "save" or training.do_eval else f"no {noun}"

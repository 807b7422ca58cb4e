"""What a run is going to do, said and checked before it trains: rows, steps, first results, rates of parts.

A continued run must be divided as the interrupted one was.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

from minicpm_tune import output_folder
from minicpm_tune.data.samples import TrainingRows
from minicpm_tune.errors import UserError
from minicpm_tune.models.parameter_parts import PartCount
from minicpm_tune.settings.argument_groups import LearningRates
from minicpm_tune.settings.arguments import TrainingArguments

logger = logging.getLogger(__name__)

MANY_EPOCHS = 20  # more than this is rarely meant
# What a run needs to go on exactly, besides the weights -> the files that hold it: one of them is there.
_STATES = {
    "the optimizer's state": ("optimizer.pt", "optimizer.bin", "optimizer_*"),
    "the place in the schedule": ("scheduler.pt",),
    "random numbers": ("rng_state*.pth",),
}


class ResumeError(UserError):
    """A checkpoint that this run can't continue."""


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
    """Work out how long a run on checked rows is, as Trainer will."""
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
    loses = ": until then an interruption loses everything"
    for what, noun, until_then in (("save", "checkpoint", loses), ("eval", "evaluation", "")):
        first = _first_step(training, plan, what)
        if first is not None and first > plan.steps:
            found.append(
                f"The first {noun} would come after {first:,} steps, but the run ends after {plan.steps:,}"
                f"{until_then}. Set {what.upper()}_STEPS (or --{what}_steps) lower."
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


def check_rates(rates: LearningRates, counts: dict[str, PartCount]) -> None:
    """Refuse a learning rate for a part that doesn't train: with adapters that depends on what they save.

    Args:
        rates: The rates that were asked for.
        counts: What trains, from ``parameter_parts.count_parts``.

    Raises:
        UserError: With the flag that would have no effect.
    """
    for part, rate in rates.parts.items():
        if rate is not None and not (part in counts and counts[part].trainable):
            flag = "embed_lr" if part == "embeddings" else f"{part}_lr"
            raise UserError(
                f"--{flag} is given, but nothing of that part trains. Leave it out, or let the part train "
                "(--lora_modules_to_save with adapters)."
            )


@dataclass(frozen=True)
class RunShape:
    """How a run is divided: what a continued run must have in common with the interrupted one.

    Attributes:
        processes: Processes over all machines.
        rows_per_step: Rows (with packing: packs) of one optimizer step, over all processes.
        rows: Rows of the training data.
        deepspeed_stage: ZeRO stage; 0 without DeepSpeed.
        trains: ``adapter`` or ``weights``.
        order: The flags that decide the order of rows.
    """

    processes: int
    rows_per_step: int
    rows: int
    deepspeed_stage: int
    trains: str
    order: str


def run_shape(training: TrainingArguments, rows: int) -> RunShape:
    """The shape of this run."""
    per_process = training.per_device_train_batch_size * training.gradient_accumulation_steps
    config = training.deepspeed or {}
    ordering = ["train_sampling_strategy", "seed" if training.data_seed is None else "data_seed", "packing"]
    if training.packing:
        ordering += ["packing_window", "model_max_length"]
    return RunShape(
        processes=training.world_size,
        rows_per_step=training.world_size * per_process,
        rows=rows,
        deepspeed_stage=config.get("zero_optimization", {}).get("stage", 0),
        trains="adapter" if training.use_lora else "weights",
        order=" ".join(f"--{name} {getattr(training, name)}" for name in ordering),
    )


def check_continues(checkpoint: Path, training: TrainingArguments, *, rows: int) -> None:
    """Check that a run with so many rows of training data can go on exactly where a checkpoint was written.

    Raises:
        ResumeError: With every difference, and what to do.
    """
    shape = run_shape(training, rows)
    manifest = output_folder.read_manifest(checkpoint)
    # Without a manifest it is of transformers' own Trainer, and taken as it is.
    before = (
        RunShape(**{name: manifest[name] for name in RunShape.__dataclass_fields__}) if manifest else shape
    )
    problems = [
        _lacks(checkpoint, shape, allowed=training.allow_inexact_resume),
        _differs_in_kind(before, shape),
        None if training.ignore_data_skip else _differs_in_rows(before, shape),
    ]
    if any(problems):
        raise ResumeError(f"{checkpoint} can't be continued: " + " Also, ".join(filter(None, problems)))
    if before.processes != shape.processes:
        logger.warning(
            "%s was written by %d processes, this run has %d: the rows continue in their order, random numbers "
            "(dropout) start anew.", checkpoint.name, before.processes, shape.processes,
        )  # fmt: skip


def _lacks(checkpoint: Path, shape: RunShape, *, allowed: bool) -> str | None:
    """What a checkpoint saved with --save_only_model does not hold, as a problem or, if allowed, as a warning."""
    missing = [
        what for what, files in _STATES.items() if not any(any(checkpoint.glob(file)) for file in files)
    ]
    if not missing or any(checkpoint.glob("global_step*")):  # DeepSpeed has all of it in there
        return None
    lacks = f"it was saved with --save_only_model true and lacks {' and '.join(missing)}"
    if shape.deepspeed_stage:
        return f"{lacks}, which DeepSpeed needs. Continue from another checkpoint."
    if not allowed:
        return (
            f"{lacks}. Continue from another checkpoint, or add --allow_inexact_resume true to start these anew: the "
            "run will then differ from one that was not interrupted."
        )
    logger.warning("%s: %s; these start anew (--allow_inexact_resume true).", checkpoint.name, lacks)
    return None


def _differs_in_kind(before: RunShape, shape: RunShape) -> str | None:
    if before.trains != shape.trains:
        return f"it trained {before.trains}, this run trains {shape.trains}. Set --use_lora as it was."
    if before.deepspeed_stage != shape.deepspeed_stage:
        then, now = (
            f"DeepSpeed ZeRO-{stage}" if stage else "no DeepSpeed"
            for stage in (before.deepspeed_stage, shape.deepspeed_stage)
        )
        return f"it was written under {then}, this run is under {now}. Set --deepspeed as it was."
    if shape.deepspeed_stage and before.processes != shape.processes:
        return (
            f"it was written by {before.processes} processes, this run has {shape.processes}. DeepSpeed's state is "
            f"divided among them: start {before.processes} again."
        )
    return None


def _differs_in_rows(before: RunShape, shape: RunShape) -> str | None:
    """Why the rows that are left of the epoch are not those that were left then."""
    if before.rows != shape.rows:
        found = f"the data had {before.rows} rows and now has {shape.rows}. Give the same data"
    elif before.order != shape.order:
        found = f"its rows came in the order of {before.order}, now it is {shape.order}. Set these flags as they were"
    elif before.rows_per_step != shape.rows_per_step:
        found = (
            f"a step had {before.rows_per_step} rows and now has {shape.rows_per_step} (processes x "
            "--per_device_train_batch_size x --gradient_accumulation_steps). Make the product the same"
        )
    else:
        return None
    return f"{found}, or add --ignore_data_skip true to begin an epoch anew."

"""Checkpoints that are whole or absent, and the choice of the one to continue from.

A checkpoint holds the trained weights, optimizer, schedule and random numbers of every process, as Trainer
writes them, and a manifest: which files belong to it, and how the run was divided.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError

from minicpm_tune import output_folder
from minicpm_tune.errors import UserError
from minicpm_tune.files import GIB, free_bytes, is_write_failure, system_reason
from minicpm_tune.output_folder import MANIFEST, UNFINISHED
from minicpm_tune.processes import gather
from minicpm_tune.settings.arguments import TrainingArguments

logger = logging.getLogger(__name__)


# What a run needs to go on exactly, besides the weights -> the files that hold it: one of them is there.
_STATES = {
    "the optimizer's state": ("optimizer.pt", "optimizer.bin", "optimizer_*"),
    "the place in the schedule": ("scheduler.pt",),
    "random numbers": ("rng_state*.pth",),
}


class CheckpointError(UserError):
    """A checkpoint that can't be written, or that this run can't continue.

    Args:
        text: The message.
        leftover: A half-written folder.
    """

    def __init__(self, text: str, *, leftover: Path | None = None):
        super().__init__(text)
        self.leftover = leftover

    def clean_up(self) -> None:
        """Delete what was half written.

        Not before the message is out: other processes write there too, would fail because of it, and be heard first.
        """
        if self.leftover is not None:
            shutil.rmtree(self.leftover, ignore_errors=True)


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
    return RunShape(
        processes=training.world_size,
        rows_per_step=training.world_size * per_process,
        rows=rows,
        deepspeed_stage=config.get("zero_optimization", {}).get("stage", 0),
        trains="adapter" if training.use_lora else "weights",
        order=_order(training),
    )


def _order(training: TrainingArguments) -> str:
    names = ["train_sampling_strategy", "seed" if training.data_seed is None else "data_seed", "packing"]
    if training.packing:
        names += ["packing_window", "model_max_length"]
    return " ".join(f"--{name} {getattr(training, name)}" for name in names)


class CheckpointWriter:
    """One checkpoint while it is written.

    Every process makes one and calls ``writing`` and ``move_into_place``; in each folder (one for all
    machines, or one per machine) exactly one process has ``owns_folder``.

    Args:
        output_dir: The output folder.
        step: Optimizer steps done.
        owns_folder: Whether this process moves the checkpoint.
        shape: The run's shape, for the manifest.
    """

    def __init__(self, output_dir: str | Path, step: int, *, owns_folder: bool, shape: RunShape):
        self.name = f"checkpoint-{step}"
        self.step, self.owns_folder, self.shape = step, owns_folder, shape
        self.final = Path(output_dir) / self.name
        self.staging = Path(output_dir) / UNFINISHED

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn the system's refusal to write into a message; see ``write_failures_as_messages``."""
        with write_failures_as_messages(self.final, leftover=self.staging / self.name):
            self.staging.mkdir(parents=True, exist_ok=True)
            yield

    def best(self, step: int | None, before: str | None) -> str | None:
        """Where the best checkpoint is, or will be once this one is in place.

        Args:
            step: The step of the best checkpoint so far.
            before: What was known before this checkpoint.
        """
        if step is None:
            return before
        path = self.final.parent / f"checkpoint-{step}"
        return str(path) if step == self.step or path.is_dir() else before

    def move_into_place(self) -> None:
        """Write the manifest, and give the checkpoint its name.

        Call when every process has written its files.
        """
        if not self.owns_folder:
            return
        with write_failures_as_messages(self.final, leftover=self.staging / self.name):
            self._move()

    def _move(self) -> None:
        written = self.staging / self.name
        files = {
            path.relative_to(written).as_posix(): path.stat().st_size
            for path in sorted(written.rglob("*"))
            if path.is_file() and path.name != MANIFEST
        }
        manifest = {"step": self.step, **asdict(self.shape), "files": files}
        with (written / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        replaced = self.staging / "replaced"
        if self.final.exists():
            # It is damaged, or the run was continued from an older checkpoint and has come here again.
            os.replace(self.final, replaced)
        os.replace(written, self.final)
        shutil.rmtree(replaced, ignore_errors=True)
        with suppress(OSError):  # not empty
            self.staging.rmdir()


@contextmanager
def write_failures_as_messages(path: Path, *, leftover: Path | None = None) -> Iterator[None]:
    """Turn the system's refusal to write something into a message.

    Args:
        path: What is written: the output folder, or a checkpoint in it.
        leftover: What to delete afterwards.

    Raises:
        CheckpointError: When the disk is full, the folder can't be written, or a quota is reached.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_write_failure(error):
            raise
        raise CheckpointError(_cannot_write(path, error), leftover=leftover) from error


def _cannot_write(path: Path, error: Exception) -> str:
    output_dir = path.parent if re.fullmatch(r"checkpoint-\d+", path.name) else path
    free = free_bytes(output_dir)
    reason, number = system_reason(error, output_dir)
    text = f"{path} could not be written: {reason}. {free / GIB:.1f} GiB are free there. "
    if free < GIB or number in (errno.ENOSPC, errno.EDQUOT):
        text += "Free some space, or let --save_total_limit keep fewer checkpoints. "
    last = output_folder.find_earlier_run(output_dir).last_checkpoint
    if last is None:
        return f"{text}There is no earlier checkpoint."
    return f"{text}{last.name} is whole: continue from it with --resume_from_checkpoint true."


def choose_checkpoint(training: TrainingArguments) -> Path | None:
    """The checkpoint to continue from, the same on every process; None to start from the beginning.

    With ``--resume_from_checkpoint true`` it is the last one that every process finds whole: machines with
    folders of their own may have been stopped between two. The ones that are passed over are logged.
    """
    if not training.continues_last:
        return None if training.resume_from_checkpoint is None else Path(training.resume_from_checkpoint)
    found = {
        step: output_folder.find_damage(path)
        for step, path in output_folder.list_checkpoints(training.output_dir)
    }
    views = gather(found)
    everywhere = set.intersection(*(set(view) for view in views))
    problems = {step: problem for view in views for step, problem in view.items() if problem is not None}
    problems |= {step: "not on every machine" for view in views for step in view if step not in everywhere}
    chosen = max((step for step in everywhere if step not in problems), default=None)
    for step in sorted(problems):
        if training.process_index == 0 and (chosen is None or step > chosen):
            logger.warning("checkpoint-%d is not whole and is passed over: %s.", step, problems[step])
    if chosen is None:
        return None
    return Path(training.output_dir) / f"checkpoint-{chosen}"


def check_continues(checkpoint: Path, training: TrainingArguments, *, rows: int) -> None:
    """Check that a run can go on exactly where a checkpoint was written.

    Args:
        checkpoint: The checkpoint.
        training: The arguments of this run.
        rows: Rows of its training data.

    Raises:
        CheckpointError: With every difference, and what to do.
    """
    shape = run_shape(training, rows)
    manifest = output_folder.read_manifest(checkpoint)
    problems = _lacks(checkpoint, shape, allowed=training.allow_inexact_resume)
    if manifest:
        before = RunShape(**{name: manifest[name] for name in RunShape.__dataclass_fields__})
        problems += _differs_in_kind(before, shape)
        problems += [] if training.ignore_data_skip else _differs_in_rows(before, shape)
    if problems:
        raise CheckpointError(f"{checkpoint} can't be continued: " + " Also, ".join(problems))
    if manifest and before.processes != shape.processes:
        logger.warning(
            "%s was written by %d processes, this run has %d: the rows continue in their order, random numbers "
            "(dropout) start anew.", checkpoint.name, before.processes, shape.processes,
        )  # fmt: skip


def _lacks(checkpoint: Path, shape: RunShape, *, allowed: bool) -> list[str]:
    """What a checkpoint saved with --save_only_model does not hold, as a problem or, if allowed, as a warning."""
    deepspeed = any(checkpoint.glob("global_step*"))  # all of it is in there
    missing = [
        what
        for what, files in _STATES.items()
        if not deepspeed and not any(any(checkpoint.glob(file)) for file in files)
    ]
    if not missing:
        return []
    lacks = f"it was saved with --save_only_model true and lacks {' and '.join(missing)}"
    if shape.deepspeed_stage:
        return [f"{lacks}, which DeepSpeed needs. Continue from another checkpoint."]
    if not allowed:
        return [
            f"{lacks}. Continue from another checkpoint, or add --allow_inexact_resume true to start these anew: the "
            "run will then differ from one that was not interrupted."
        ]
    logger.warning("%s: %s; these start anew (--allow_inexact_resume true).", checkpoint.name, lacks)
    return []


def _differs_in_kind(before: RunShape, shape: RunShape) -> list[str]:
    if before.trains != shape.trains:
        return [f"it trained {before.trains}, this run trains {shape.trains}. Set --use_lora as it was."]
    if before.deepspeed_stage != shape.deepspeed_stage:
        return [
            f"it was written under {_stage(before)}, this run is under {_stage(shape)}. Set --deepspeed as it was."
        ]
    if shape.deepspeed_stage and before.processes != shape.processes:
        return [
            f"it was written by {before.processes} processes, this run has {shape.processes}. DeepSpeed's state is "
            f"divided among them: start {before.processes} again."
        ]
    return []


def _differs_in_rows(before: RunShape, shape: RunShape) -> list[str]:
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
        return []
    return [f"{found}, or add --ignore_data_skip true to begin an epoch anew."]


def _stage(shape: RunShape) -> str:
    return f"DeepSpeed ZeRO-{shape.deepspeed_stage}" if shape.deepspeed_stage else "no DeepSpeed"

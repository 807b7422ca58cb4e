"""What a run leaves in writing: ``run.json`` to repeat it, and the model card beside a saved adapter."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import SchedulerType, TrainerState

from minicpm_tune.data.files.row_files import Mixture
from minicpm_tune.data.samples import TrainingRows
from minicpm_tune.output_folder import RUN_RECORD
from minicpm_tune.processes import world_size
from minicpm_tune.settings.arguments import Arguments, TrainingArguments

logger = logging.getLogger(__name__)

_PACKAGES = (
    "torch", "transformers", "accelerate", "peft", "deepspeed", "bitsandbytes", "safetensors", "tokenizers", "numpy",
    "pillow",
)  # fmt: skip


class RunRecord:
    """The record of one output folder; each start of the run adds an entry, so that resumed runs show.

    Digests of large files take a while, so a thread works them out beside the training.

    Args:
        folder: The output folder.
        argv: The words after the script's name.
        writes: Whether this process writes it; the others only go through the motions.
    """

    def __init__(self, folder: Path, argv: Sequence[str], *, writes: bool = True):
        self.path, self.writes = folder / RUN_RECORD, writes
        self._starts = read_starts(self.path)
        self._entry: dict[str, Any] = {
            "started": _now(),
            "ended": None,
            "outcome": None,
            "command": [sys.executable, sys.argv[0], *argv],
            "folder": os.getcwd(),
            "git_commit": _git_commit(),
            "versions": _versions(),
            "machine": _machine(),
        }
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, **values: Any) -> None:
        """Add to this start's entry, and write the record; where the disk is full, the next time.

        Args:
            **values: Name -> anything that JSON can hold, and paths.
        """
        if not self.writes:
            return
        with self._lock:
            self._entry.update(values)
            text = json.dumps(
                {"starts": [*self._starts, self._entry]}, indent=1, default=str, ensure_ascii=False
            )
            partial = self.path.with_name(f"{RUN_RECORD}.partial")
            try:
                partial.write_text(text + "\n", encoding="utf-8")
                partial.replace(self.path)
            except OSError as error:  # a record is no reason to end a run
                logger.warning("%s was not written: %s", self.path, error)

    def add_rows(self, train: TrainingRows | None, evaluation: TrainingRows | None) -> None:
        """Add the data files with their rows, those used, their samples per epoch and, once known, their digests.

        Of rows that ``--eval_split`` has divided, a digest of their numbers tells whether two runs had the same.
        """
        given = (("training", train), ("evaluation", evaluation))
        mixtures = {name: rows.mixture for name, rows in given if rows is not None}
        data = {
            name: [
                {
                    "path": str(source.rows.path),
                    "rows": len(source.rows),
                    "rows_used": source.used,
                    "samples_per_epoch": source.samples,
                }
                for source in mixture.files
            ]
            for name, mixture in mixtures.items()
        }
        numbers = {
            name: hashlib.sha256(mixture.numbers.astype("<i8").tobytes()).hexdigest()
            for name, mixture in mixtures.items()
            if mixture.is_part
        }
        self.add(data=data, **({"row_numbers_sha256": numbers} if numbers else {}))
        if self.writes:
            self._thread = threading.Thread(target=self._add_digests, args=(data,), daemon=True)
            self._thread.start()

    def _add_digests(self, data: dict[str, list[dict[str, Any]]]) -> None:
        for entry in chain.from_iterable(data.values()):
            entry["sha256"] = digest(Path(entry["path"]))
        self.add(data=data)

    def end(self, outcome: str, **values: Any) -> None:
        """Write how it ended."""
        if self._thread is not None:
            self._thread.join()
        self.add(ended=_now(), outcome=outcome, **values)


def start_record(argv: Sequence[str], arguments: Arguments) -> RunRecord:
    """Begin the record of a run; the first process writes it.

    Args:
        argv: The words after the script's name.
        arguments: What was made of them.
    """
    training = arguments.training
    record = RunRecord(Path(training.output_dir), argv, writes=training.process_index == 0)
    record.add(arguments={type(group).__name__: _plain_arguments(group) for group in arguments})
    return record


def digest(path: Path) -> str | None:
    """SHA-256 of a file; of a folder that datasets saved, of its ``state.json``, which holds its fingerprint."""
    file = path / "state.json" if path.is_dir() else path
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The entries of a ``run.json``, one for every start; none where it can't be read."""
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))["starts"]
    except (ValueError, KeyError, TypeError):
        return []  # not ours, or cut short; it is only a record


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _git_commit() -> str | None:
    """The commit of this program's folder, with a mark when files were changed since; None outside git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def _machine() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "processes": world_size(),
    }


def _plain_arguments(group: Any) -> dict[str, Any]:
    values = group.to_dict() if hasattr(group, "to_dict") else asdict(group)
    return {name: value for name, value in values.items() if value is not None}


CARD_FILE = "README.md"
_CARD = """---
{base_model}library_name: peft
pipeline_tag: image-text-to-text
tags:
- lora
---

# LoRA adapter of {name}

Trained for {steps} steps ({epochs:.2f} epochs) on

| data file | rows | samples in an epoch |
|---|---|---|
{files}

| | |
|---|---|
{values}

Load it with PEFT on {name}, or with the scripts that trained it:

    python chat.py --adapter FOLDER --image PICTURE --question "What is this?"
    python merge_lora.py --adapter FOLDER --output_dir MERGED
"""


def write_model_card(
    folder: Path, *, config: LoraConfig, training: TrainingArguments, state: TrainerState, data: Mixture
) -> None:
    """Write the card of an adapter into its folder: what it was made of, and how far its run is."""
    base = config.base_model_name_or_path or ""
    is_folder = Path(base).is_dir()  # a name on the hub is a link there; a path here is no one's concern
    name = Path(base).name if is_folder else base
    files = [f"| {Path(file.rows.path).name} | {file.used} | {file.samples} |" for file in data.files]
    values = [f"| {what} | {value} |" for what, value in _values(config, training, state).items()]
    text = _CARD.format(
        base_model="" if is_folder else f"base_model: {base}\n",
        name=name,
        steps=state.global_step,
        epochs=state.epoch or 0.0,
        files="\n".join(files),
        values="\n".join(values),
    )
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def _values(config: LoraConfig, training: TrainingArguments, state: TrainerState) -> dict[str, object]:
    per_process = training.per_device_train_batch_size * training.gradient_accumulation_steps
    values: dict[str, object] = {
        "rank, alpha, dropout": f"{config.r}, {config.lora_alpha:g}, {config.lora_dropout:g}",
        "also trained in full": ", ".join(sorted(config.modules_to_save or ())) or "nothing",
        "learning rate": f"{training.learning_rate:g}, {SchedulerType(training.lr_scheduler_type).value}",
        "rows in a step": per_process * training.world_size,
        "longest row": f"{training.model_max_length} tokens",
        "precision": str(training.weight_dtype).removeprefix("torch."),
        "seed": training.seed,
    }
    for key, what in (("loss", "training loss"), ("eval_loss", "evaluation loss")):
        found = [line for line in state.log_history if key in line]
        if found:
            values[what] = f"{found[-1][key]:.4g} (step {found[-1]['step']})"
    return values

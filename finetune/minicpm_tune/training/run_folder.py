"""The output folder while a run goes on: locked for this run, shared between machines or not, with whole checkpoints.

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
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

from safetensors import SafetensorError
from torch import distributed

from minicpm_tune import output_folder
from minicpm_tune.errors import UserError
from minicpm_tune.files import GIB, free_bytes, is_write_failure, system_reason
from minicpm_tune.output_folder import LOCK_FILE, LOGS, MANIFEST, UNFINISHED
from minicpm_tune.processes import gather, local_world_size
from minicpm_tune.settings.arguments import TrainingArguments
from minicpm_tune.training.run_plan import RunShape

logger = logging.getLogger(__name__)

_LOCK_TRIES = 4  # a run that was just killed may take a moment to go
_SECOND = 1.0
# Files of single processes; each lies on the machine of its process.
_OF_ONE_PROCESS = re.compile(r"rng_state_\d+\.pth|.*zero_pp_rank_\d+_.*")
_CHUNK = 2**26  # bytes sent at once


class RunFolderError(UserError):
    """An output folder that this run can't write to, or that another run is using."""


class RunFolder:
    """The output folder of this run, from ``take`` until the process ends.

    Every process of the run has one. The lock is the system's own: one process per folder holds it, and it is gone
    with that process, however it ends. The file's text only says whose it is.

    Args:
        training: The arguments; ``resume_from_checkpoint`` becomes the chosen checkpoint.

    Attributes:
        owns_folder: Whether this process, of all that see the folder, arranges things in it.
    """

    def __init__(self, training: TrainingArguments):
        self.training = training
        self.path = Path(training.output_dir)
        self.owns_folder = training.process_index == 0
        self._shared = True
        self._lock: IO[str] | None = None

    def take(self) -> None:
        """Create the folder, and lock it for this run.

        Raises:
            RunFolderError: On every process alike, when one of them can't use the folder.
        """
        self._raise_first(self._writable())
        if self.training.world_size > local_world_size():
            self._shared = self._is_shared()
            if not self._shared:
                self.owns_folder = self.training.local_process_index == 0
        if self.training.do_train:
            self._raise_first(self._lock_it() if self.owns_folder else None)

    def prepare(self) -> None:
        """Delete what is half written or was asked to be deleted, and choose the checkpoint to continue from."""
        training = self.training
        if not training.do_train:
            return
        if not self._shared:
            logger.info(
                "Each machine has its own output folder, and keeps its processes' part of each checkpoint."
            )
        if self.owns_folder:
            self._clean()
        gather(None)  # nobody looks for checkpoints before all is cleaned
        chosen = choose_checkpoint(training)
        training.resume_from_checkpoint = None if chosen is None else str(chosen)
        if chosen is None:
            return
        logger.info("Continuing from %s.", chosen)
        if not self._shared:
            fetched = _fetch_missing(chosen, writes=self.owns_folder)
            logger.info("Sent to the machines that lacked them: %s.", ", ".join(fetched) or "nothing")

    def _raise_first(self, problem: str | None) -> None:
        problems = [text for text in gather(problem) if text is not None]
        if problems:
            raise RunFolderError(problems[0])

    def _writable(self) -> str | None:
        probe = self.path / f".probe-{uuid.uuid4().hex}"
        try:
            (self.path / LOGS).mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"0")
            probe.unlink()
        except OSError as error:
            return (
                f"--output_dir {str(self.path)!r} can't be written to on {socket.gethostname()}: {error.strerror}. "
                "Give a folder on a disk with space, where you may write."
            )
        return None

    def _is_shared(self) -> bool:
        """Whether all machines see the same folder."""
        probe = self.path / f".probe-{gather(uuid.uuid4().hex)[0]}"
        if self.owns_folder:
            probe.write_bytes(b"0")
        gather(None)
        shared = all(gather(probe.exists()))
        if self.owns_folder:
            probe.unlink()
        return shared

    def _lock_it(self) -> str | None:
        path = self.path / LOGS / LOCK_FILE
        file = path.open("a+", encoding="utf-8")
        try:
            tries_left = _LOCK_TRIES
            while not output_folder.lock(file):
                tries_left -= 1
                if not tries_left:
                    file.seek(0)
                    return output_folder.in_use(self.path, file.read().strip() or "unknown")
                time.sleep(_SECOND)
        except OSError as error:
            logger.warning(
                "%s: this file system has no locks (%s); make sure that no other run uses it.", path, error
            )
        file.seek(0)
        file.truncate()
        file.write(
            f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        )
        file.flush()
        self._lock = file
        return None

    def _clean(self) -> None:
        if self.training.overwrite_output_dir:
            gone = output_folder.remove_earlier_run(self.path)
            if gone:
                logger.info("Deleted from the earlier run: %s.", ", ".join(path.name for path in gone))
        half_written = self.path / UNFINISHED
        if half_written.is_dir():
            names = ", ".join(sorted(path.name for path in half_written.iterdir())) or "nothing"
            logger.warning("%s was being written when the run ended, and is deleted.", names)
            shutil.rmtree(half_written)

    def close(self) -> None:
        """Release the folder. The lock's file stays: deleting it could let two other runs in at once."""
        if self._lock is not None:
            self._lock.truncate(0)
            self._lock.close()
            self._lock = None


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


def _fetch_missing(checkpoint: Path, *, writes: bool) -> list[str]:
    """Bring a checkpoint's weights and states from rank 0's machine to those where they are missing.

    They are written once, on rank 0's machine, and travel only when a run is continued. Every process calls this,
    and one per folder ``writes``. Gives what was missing on some machine.
    """
    here = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    views = gather((here, writes))
    shared = [name for name in sorted(views[0][0]) if name != MANIFEST]
    names = [name for name in shared if not _OF_ONE_PROCESS.fullmatch(Path(name).name)]
    missing = [name for name in names if any(name not in found for found, writer in views if writer)]
    for name in missing:
        _send(checkpoint / name, writes=writes and name not in here)
    return missing


def _send(path: Path, *, writes: bool) -> None:
    """Send a file from rank 0 to all processes; those that lack it write it, under its name when it is whole."""
    partial = path.with_name(f"{path.name}.partial")
    with ExitStack() as files:
        source = files.enter_context(path.open("rb")) if distributed.get_rank() == 0 else None
        if writes:
            partial.parent.mkdir(parents=True, exist_ok=True)
        target = files.enter_context(partial.open("wb")) if writes else None
        chunk = [b" "]
        while chunk[0]:
            chunk = [b"" if source is None else source.read(_CHUNK)]
            distributed.broadcast_object_list(chunk, src=0)
            if target is not None:
                target.write(chunk[0])
    if writes:
        partial.replace(path)


class CheckpointError(UserError):
    """A checkpoint that can't be written.

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
        self.written = self.staging / self.name

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn the system's refusal to write into a message; see ``write_failures_as_messages``."""
        with write_failures_as_messages(self.final, leftover=self.written):
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
        with write_failures_as_messages(self.final, leftover=self.written):
            files = {
                path.relative_to(self.written).as_posix(): path.stat().st_size
                for path in sorted(self.written.rglob("*"))
                if path.is_file() and path.name != MANIFEST
            }
            manifest = {"step": self.step, **asdict(self.shape), "files": files}
            with (self.written / MANIFEST).open("w", encoding="utf-8") as file:
                json.dump(manifest, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            replaced = self.staging / "replaced"
            if self.final.exists():
                # It is damaged, or the run was continued from an older checkpoint and has come here again.
                os.replace(self.final, replaced)
            os.replace(self.written, self.final)
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

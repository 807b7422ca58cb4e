"""How a process of a run starts and ends: logs, messages for mistakes, one error shown once, a clean exit."""

from __future__ import annotations

import atexit
import faulthandler
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import torch
import transformers
from tqdm import tqdm
from transformers import TrainerCallback

from minicpm_tune import processes
from minicpm_tune.errors import UserError
from minicpm_tune.logs import LOG_ONLY, ROOT, silence
from minicpm_tune.safe_loading import refuse_pickles
from minicpm_tune.settings.arguments import TrainingArguments
from minicpm_tune.training.checkpointing import CheckpointError
from minicpm_tune.training.nonfinite_and_memory import is_out_of_memory, memory_advice
from minicpm_tune.training.peer_monitor import PeerMonitor
from minicpm_tune.training.run_folder import LOGS

_INTERRUPTED = 130  # 128 + SIGINT, as shells count
# All processes of a machine make the same mistake at the same time; the first one's message is enough, and
# torchrun ends the others within a tenth of a second. A mistake of one alone is shown after this.
_LATER = 3.0  # seconds
_PATIENCE = 5.0  # seconds for the reason of a failed operation between processes to show


class ProcessLifecycle:
    """One process of a run, from its first line to its exit code.

    Attributes:
        exit_code: What the process will end with.
        watch: The watch over the other processes, once they have joined.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self.watch: PeerMonitor | None = None
        self._training: TrainingArguments | None = None
        self._log: IO[str] | None = None
        self._screen = sys.stderr
        refuse_pickles()
        _log_to_screen()
        sys.excepthook = self._end_by

    def begin(self, training: TrainingArguments) -> PeerMonitor:
        """Log to ``logs/rank<number>.log`` in the output folder too, and watch over the other processes.

        The log of every rank holds all that rank 0 shows on the screen.

        Returns:
            The watch.
        """
        self._training = training
        folder = Path(training.output_dir) / LOGS
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(folder / f"rank{processes.rank()}.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)
        transformers.utils.logging.add_handler(handler)
        logging.raiseExceptions = False  # a disk that is full for a moment must not spoil the screen
        assert handler.stream is not None  # opened at once, without ``delay``
        self._log = handler.stream
        faulthandler.enable(handler.stream)
        # Joining the processes has put torch's hook around ours, which collects what is written (torch 2.13).
        sys.excepthook = self._end_by
        self.watch = PeerMonitor(limit=training.ddp_timeout, dump=self._dump_stacks)
        self.watch.start()
        return self.watch

    def _dump_stacks(self) -> None:
        if self._log is not None:
            faulthandler.dump_traceback(self._log, all_threads=True)

    @contextmanager
    def user_errors_as_messages(self) -> Iterator[None]:
        """Show a mistake of the user's as one message, without a traceback.

        Any exception that is not a ``UserError`` is a fault of the program and keeps its traceback.
        """
        try:
            yield
        except UserError as error:
            self.exit_code = 1
            self._show(f"error: {error}")
            if isinstance(error, CheckpointError):
                error.clean_up()
        except RuntimeError as error:
            # While training the trainer knows more; this is about loading the model, or putting it on a GPU.
            if self._training is None or not is_out_of_memory(error):
                raise
            self.exit_code = 1
            self._show(f"error: {memory_advice(error, self._training, None, ())}")
        except KeyboardInterrupt:
            self.exit_code = _INTERRUPTED
            self._show("Interrupted before training began; there is nothing to save.")

    def _end_by(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """End the process by an exception that nobody expected, after finding out whose it is."""
        text = "".join(traceback.format_exception(kind, error, trace))
        reason = None
        if self.watch is not None:
            # When another process fails, operations with it raise here, of the family of RuntimeError.
            reason = self.watch.reason_of_others(_PATIENCE if issubclass(kind, RuntimeError) else 0)
        if reason is None:
            self._show(f"process {processes.rank()} on {socket.gethostname()}:\n{text}", summary=str(error))
        else:
            self._write_log(text)
            self._show(f"error: {reason}")
        self._leave(1)

    def _show(self, text: str, *, summary: str | None = None) -> None:
        """Show a message on the screen, if this process is the first to have one; in its log in any case."""
        self._write_log(text)
        if self.watch is not None:
            first = self.watch.claim((summary or text).removeprefix("error: ").split("\n")[0])
        else:
            first = True
            if processes.local_rank() > 0:
                time.sleep(_LATER)
        if first:
            self._screen.write(f"\n{text}\n")
            self._screen.flush()
        elif self.watch is not None:
            self.watch.show_elsewhere()

    def _write_log(self, text: str) -> None:
        if self._log is not None:
            with suppress(OSError):  # a full disk, say, which may be what the message is about
                self._log.write(f"{text}\n")
                self._log.flush()

    def end(self) -> int:
        """Leave the other processes, and end.

        On the CPU a gloo thread can abort the interpreter while it shuts down (about 3 of 15 runs under
        ZeRO-3, torch 2.13), after everything is written; leaving at once avoids it.

        Returns:
            The exit code, where the process may end the ordinary way.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.exit_code
        if self.exit_code == 0:
            if self.watch is not None:
                self.watch.finish()
            torch.distributed.barrier()
            atexit._run_exitfuncs()  # those of reporters (wandb), which os._exit would pass over
        self._leave(self.exit_code)
        return self.exit_code

    def _leave(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        logging.shutdown()
        os._exit(code)


class _Screen(logging.StreamHandler):
    """Writes lines above a progress bar, not into it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=self.stream)


class StepLog(TrainerCallback):
    """Every line of numbers also goes to the process's log."""

    def on_log(
        self, args: object, state: object, control: object, logs: object = None, **kwargs: object
    ) -> None:
        logging.getLogger(LOG_ONLY).info("step %s: %s", getattr(state, "global_step", "?"), logs)


def _log_to_screen() -> None:
    """Log from rank 0 on the screen; from other ranks only warnings of their own."""
    screen = _Screen(sys.stderr)
    screen.setFormatter(logging.Formatter("%(message)s"))
    screen.setLevel(logging.INFO if processes.rank() == 0 else logging.WARNING)
    screen.addFilter(lambda record: record.name != LOG_ONLY)
    logging.basicConfig(level=logging.WARNING, handlers=[screen], force=True)
    logging.getLogger(ROOT).setLevel(logging.INFO)
    silence()

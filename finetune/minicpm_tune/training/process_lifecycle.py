"""How a process starts and ends: logs, signals, messages for mistakes, one error shown once, a clean exit.

Imports neither torch nor transformers at its top, so that a process is prepared before these seconds of imports
begin, and ``--help`` needs none of them.

SIGINT, SIGTERM, and SIGHUP end a process that does not train yet: there is nothing to save. While it trains, the first
one lets the step finish and a checkpoint be written; the second ends the run at once.
"""

from __future__ import annotations

import atexit
import faulthandler
import logging
import os
import signal
import socket
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, TYPE_CHECKING, Any, NoReturn

from minicpm_tune import processes
from minicpm_tune.errors import UserError
from minicpm_tune.files import refuse_pickles
from minicpm_tune.logs import log_to_file, log_to_screen, silence_libraries
from minicpm_tune.output_folder import LOGS

if TYPE_CHECKING:
    from minicpm_tune.settings.arguments import TrainingArguments
    from minicpm_tune.training.peer_monitor import PeerMonitor

_INTERRUPTED = 130  # 128 + SIGINT, as shells count
# All processes of a machine make the same mistake at the same time; the first one's message is enough, and
# torchrun ends the others within a tenth of a second. A mistake of one alone is shown after this.
_LATER = 3.0  # seconds
_PATIENCE = 5.0  # seconds for the reason of a failed operation between processes to show


class ProcessLifecycle:
    """One process, from its first line to its exit code.

    Attributes:
        exit_code: What the process will end with.
        peers: The watch over the run's other processes, once they have joined.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self.peers: PeerMonitor | None = None
        self._training: TrainingArguments | None = None
        self._log: IO[str] | None = None
        silence_libraries()
        refuse_pickles()
        log_to_screen(first=processes.rank() == 0)
        self._screen = sys.stderr
        sys.excepthook = self._end_by

    def begin(self, training: TrainingArguments) -> PeerMonitor:
        """Log to ``logs/rank<number>.log`` in the output folder too, and watch over the other processes.

        The log of every rank holds all that rank 0 shows on the screen.

        Returns:
            The watch.
        """
        from minicpm_tune.training.peer_monitor import PeerMonitor

        self._training = training
        folder = Path(training.output_dir) / LOGS
        folder.mkdir(parents=True, exist_ok=True)
        self._log = log_to_file(folder / f"rank{processes.rank()}.log")
        faulthandler.enable(self._log)
        # Joining the processes has put torch's hook around ours, which collects what is written (torch 2.13).
        sys.excepthook = self._end_by
        self.peers = PeerMonitor(limit=training.ddp_timeout, stack_log=self._log)
        self.peers.start()
        return self.peers

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
            error.clean_up()
        except RuntimeError as error:
            from minicpm_tune.training.nonfinite_and_memory import is_out_of_memory, memory_advice

            # While training the trainer knows more; this is about loading the model, or putting it on a GPU.
            if self._training is None or not is_out_of_memory(error):
                raise
            self.exit_code = 1
            self._show(f"error: {memory_advice(error, self._training, None, ())}")

    def _end_by(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """End the process by an exception that nobody expected, after finding out whose it is."""
        text = "".join(traceback.format_exception(kind, error, trace))
        reason = None
        if self.peers is not None:
            # When another process fails, operations with it raise here, of the family of RuntimeError.
            reason = self.peers.reason_of_others(_PATIENCE if issubclass(kind, RuntimeError) else 0)
        if reason is None:
            self._show(f"process {processes.rank()} on {socket.gethostname()}:\n{text}", summary=str(error))
        else:
            self._write_log(text)
            self._show(f"error: {reason}")
        self._leave(1)

    def _show(self, text: str, *, summary: str | None = None) -> None:
        """Show a message on the screen, if this process is the first to have one; in its log in any case."""
        self._write_log(text)
        first = True
        if self.peers is not None:
            first = self.peers.report_failure((summary or text).removeprefix("error: ").split("\n")[0])
        elif processes.local_rank() > 0:
            time.sleep(_LATER)
        if first:
            self._screen.write(f"\n{text}\n")
            self._screen.flush()
        elif self.peers is not None:
            self.peers.show_failure_elsewhere()

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
        distributed = sys.modules.get("torch.distributed")
        if distributed is None or not (distributed.is_available() and distributed.is_initialized()):
            return self.exit_code
        if self.exit_code == 0:
            if self.peers is not None:
                self.peers.finish()
            distributed.barrier()
            atexit._run_exitfuncs()  # those of reporters (wandb), which os._exit would pass over
        self._leave(self.exit_code)

    def _leave(self, code: int) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        logging.shutdown()
        os._exit(code)


def run_command(run: Callable[[Any], int | None], values: Namespace, *, interrupted: str) -> int:
    """Run one of the small commands.

    Args:
        run: Does the work; a number that it gives is the exit code of success.
        values: The command's flags.
        interrupted: What is said after Ctrl-C.

    Returns:
        The exit code: 0 or ``run``'s own, 1 after a message for a user's mistake, 130 after Ctrl-C.
    """
    lifecycle = ProcessLifecycle()
    with lifecycle.user_errors_as_messages():
        try:
            lifecycle.exit_code = run(values) or 0
        except KeyboardInterrupt:
            lifecycle.exit_code = _INTERRUPTED
            sys.stderr.write(f"\n{interrupted}\n")
    return lifecycle.end()


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Set by start_processes.py, which then does what is left to the one process that got the signal from the user:
# to show a line, and to end everything at the second signal.
LAUNCHED = "MINICPM_TUNE_LAUNCHED"


def say(number: int, text: str) -> None:
    """Show a line about a signal; not through a stream, which may be in the middle of a line."""
    with suppress(OSError):  # the terminal may be gone: that is what SIGHUP says
        os.write(2, f"\n{signal.Signals(number).name}: {text}\n".encode())


def handle(number: signal.Signals, handler: Any) -> Any:
    """Set a handler and give the one before; a SIGHUP that nohup has switched off stays so."""
    if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
        return signal.SIG_IGN
    return signal.signal(number, handler)


def end_at_interrupt() -> None:
    """Until training begins, let Ctrl-C end the process at once, with one line and without a traceback."""
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process and _is_asked_itself():
            say(number, "nothing was trained yet, so nothing is saved.")
        os._exit(128 + number)

    signal.signal(signal.SIGINT, end)


def _is_asked_itself() -> bool:
    """Whether this process, of those on its machine, is the one to answer the user."""
    return LAUNCHED not in os.environ and os.environ.get("LOCAL_RANK", "0") == "0"


class StopSignals:
    """Notes a signal, for the training loop to look at between two steps.

    Attributes:
        signal: The signal that came, or None.
        promise: What is done about it, as the user is told.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.promise = "finishing the step and writing a checkpoint"
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Note signals from now on."""
        self._before = {number: handle(number, self._note) for number in SIGNALS}

    def stop_listening(self) -> None:
        """Let signals do again what they did before."""
        for number, handler in self._before.items():
            handle(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker that loads data: its rows are still needed for the step
        if self.signal is None:
            self.signal = number
            if _is_asked_itself():
                say(number, f"{self.promise}. A second signal ends the run at once.")
        elif LAUNCHED not in os.environ:
            os._exit(128 + number)

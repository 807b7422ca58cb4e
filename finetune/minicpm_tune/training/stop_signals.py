"""What SIGINT, SIGTERM and SIGHUP do to a run.

Before training there is nothing to save, and they end the process. While it trains, the first one lets the step be
finished and a checkpoint be written; the second ends the run at once.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import Any

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

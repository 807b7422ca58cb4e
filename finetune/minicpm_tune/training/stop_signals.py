"""What SIGINT, SIGTERM and SIGHUP do to a run, and the command that continues a stopped one.

Before training there is nothing to save, and they end the process. While it trains, the first one lets the step be
finished and a checkpoint be written; the second ends the run at once.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Set by start_processes.py, which then does what is left to the one process that got the signal from the user:
# to show a line, and to end everything at the second signal.
LAUNCHED = "MINICPM_TUNE_LAUNCHED"
_NEXT_RUN_DECIDES = ("resume_from_checkpoint", "overwrite_output_dir")


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
    """

    def __init__(self) -> None:
        self.signal: int | None = None
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
                say(
                    number,
                    "finishing the step and writing a checkpoint. A second signal ends the run at once.",
                )
        elif LAUNCHED not in os.environ:
            os._exit(128 + number)


def log_how_to_continue(argv: list[str], *, step: int, steps: int) -> None:
    """After a signal, log what was saved and the command that continues from it."""
    logger.info(
        "Stopped after step %d of %d; checkpoint-%d holds everything. To continue, in %s:\n\n    %s\n",
        step, steps, step, os.getcwd(), command_to_continue(argv, script=sys.argv[0]),
    )  # fmt: skip


def command_to_continue(argv: list[str], *, script: str) -> str:
    """The command line that goes on where this run stopped, from the folder it was started in.

    Args:
        argv: The words after the script's name.
        script: The script's name, as it was started.

    Example:
        >>> words = ["--data_path", "my rows.json", "--overwrite_output_dir", "true"]
        >>> command_to_continue(words, script="finetune.py").partition(" ")[2]
        "finetune.py --data_path 'my rows.json' --resume_from_checkpoint true"
    """
    words = [*_without(argv, _NEXT_RUN_DECIDES), "--resume_from_checkpoint", "true"]
    return shlex.join([*_start(), script, *words])


def _start() -> list[str]:
    """How the processes of this run were started."""
    here, everywhere = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")
    if here is None or "TORCHELASTIC_RUN_ID" not in os.environ:
        return [os.path.basename(sys.executable)]
    start = ["torchrun", "--nproc_per_node", here]
    if everywhere != here:
        start += ["--nnodes", os.environ["GROUP_WORLD_SIZE"], "--node_rank", os.environ["GROUP_RANK"]]
        start += ["--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"]]
    return start


def _without(argv: list[str], names: tuple[str, ...]) -> list[str]:
    """Leave flags out, with their values."""
    kept: list[str] = []
    dropping = False
    for word in argv:
        if word.startswith("--"):
            dropping = word[2:].partition("=")[0].replace("-", "_") in names
        if not dropping:
            kept.append(word)
    return kept

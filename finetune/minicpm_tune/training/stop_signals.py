"""SIGTERM and SIGINT: finish the step, save, and say how to continue."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import time
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A launcher passes on what the whole group already got; only later ones mean "at once".
_SAME_REQUEST = 3.0  # seconds
NOTE = "the step is finished and a checkpoint written. A second signal ends at once."
_NEXT_RUN_DECIDES = ("resume_from_checkpoint", "overwrite_output_dir")


class StopSignals:
    """Notes a signal, for the training loop to look at between two steps."""

    def __init__(self, *, speaks: bool):
        """Start deaf.

        Args:
            speaks: Whether this process says on the screen that a signal came.
        """
        self.speaks = speaks
        self.signal: int | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """From now on note signals. Before, there is nothing to save, and they end the process as usual."""
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)

    def deafen(self) -> None:
        """Let signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
            if self.speaks:
                # Not through logging, which may be in the middle of a line.
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: {NOTE}\n".encode())
        elif time.monotonic() - self._since > _SAME_REQUEST:
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

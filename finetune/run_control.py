"""How a process of a run starts and ends: logging, messages for the user's mistakes, a clean exit."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hardware import process_rank

logger = logging.getLogger(__name__)

# Warnings of libraries that a user of this script can do nothing about, each by its beginning.
_QUIET_WARNINGS = (
    "`torch.jit.script_method` is deprecated",
    "`is_gradient_checkpointing` is deprecated",
    "The PEFT config's `base_model_name_or_path` was renamed",
)


@dataclass
class Outcome:
    """How a run ended."""

    exit_code: int = 0


def set_up_logging() -> None:
    """Log from rank 0 on the screen; from other ranks only warnings of their own."""
    level = logging.INFO if process_rank() == 0 else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    for name in _own_modules():
        logging.getLogger(name).setLevel(level)
    for text in _QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message=text)


def _own_modules() -> list[str]:
    folder = os.path.dirname(os.path.abspath(__file__))
    return [name.removesuffix(".py") for name in os.listdir(folder) if name.endswith(".py")]


@contextmanager
def user_errors_as_messages() -> Iterator[Outcome]:
    """Show a mistake of the user's as one message on rank 0, without a traceback.

    Our own errors for wrong input are subclasses of ValueError that are defined in this folder;
    any other exception is a fault of the program and keeps its traceback.
    """
    outcome = Outcome()
    try:
        yield outcome
    except ValueError as error:
        if type(error).__module__ not in _own_modules():
            raise
        outcome.exit_code = 1
        if process_rank() == 0:
            sys.stderr.write(f"\nerror: {error}\n")


def end_process(code: int) -> int:
    """Leave the process group, and the process.

    On the CPU a gloo thread can abort the interpreter while it shuts down (about 3 of 15 runs under
    ZeRO-3, torch 2.13), after everything is written; leaving at once avoids it.

    Returns:
        The code, where the process may end the ordinary way.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed:
        return code
    if code == 0:
        torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(code)

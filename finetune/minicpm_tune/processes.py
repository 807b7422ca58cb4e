"""The processes of a run: which one this is, and what all of them know.

The first four functions read the variables that torchrun sets, need no torch, and hold before the processes
have joined. ``joined`` and ``gather`` are about processes that have.
"""

from __future__ import annotations

import os
from typing import TypeVar

from minicpm_tune.errors import UserError

T = TypeVar("T")


def rank() -> int:
    """This process's number over all machines, from 0; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes over all machines; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_restart() -> None:
    """Refuse processes that torchrun has started again with the store of those that ended.

    They would find the addresses of these there, and wait for them for ever (torch 2.13).

    Raises:
        UserError: With the two ways that work.
    """
    started_again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if started_again and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            "torchrun --max_restarts has started the processes again with the rendezvous of those that ended, where "
            "they can't find each other. Use the launchers with MAX_RESTARTS, or torchrun with --rdzv_backend c10d "
            "and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1."
        )


def joined() -> tuple[int, int]:
    """Rank and number of the processes that have joined; (0, 1) where each works alone."""
    from torch import distributed  # commands without torch ask for ranks too

    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gather(value: T) -> list[T]:
    """The values of all processes that have joined, in the order of their ranks. All of them must call it."""
    from torch import distributed  # as in ``joined``

    count = joined()[1]
    values = [value] * count
    if count > 1:
        distributed.all_gather_object(values, value)
    return values

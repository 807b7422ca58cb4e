"""NCCL on consumer cards: what the guides tell people to set by hand, set where it is needed."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

# GeForce RTX 4090, but not RTX 4000 Ada or RTX A6000, which are workstation cards with peer access.
_CONSUMER = re.compile(r"\bGeForce (?:RTX|GTX) (\d\d)\d\d\b")
# From this series on GeForce cards have no NVLink and no peer access over PCIe, but some drivers say that
# they have, and NCCL then hangs or computes with garbage (github.com/NVIDIA/nccl-tests/issues/117).
_WITHOUT_PEER_ACCESS = 40
_INFINIBAND = Path("/sys/class/infiniband")


@dataclass(frozen=True)
class Cards:
    """What matters of the run's GPUs, seen from one process.

    Attributes:
        names: Names of the GPUs of this machine that the run may use.
        reach_each_other: Whether the driver says that each can read the others' memory.
        processes: Processes of the run, over all machines.
        processes_here: Processes on this machine.
        infiniband: Whether this machine has InfiniBand.
    """

    names: tuple[str, ...]
    reach_each_other: bool
    processes: int
    processes_here: int
    infiniband: bool


def settings_for(cards: Cards) -> dict[str, str]:
    """The variables that NCCL needs with these cards; none with data-centre cards or a single process.

    Peer access is switched off for cards that lack it: a pair of RTX 3090 joined by NVLink keeps it.
    InfiniBand is switched off beside consumer cards unless it joins the machines of the run.

    Example:
        >>> settings_for(Cards(("NVIDIA GeForce RTX 4090",) * 2, True, 2, 2, False))
        {'NCCL_P2P_DISABLE': '1', 'NCCL_IB_DISABLE': '1'}
        >>> settings_for(Cards(("NVIDIA H200",) * 2, True, 2, 2, True))
        {}
    """
    series = [int(found[1]) for found in map(_CONSUMER.search, cards.names) if found]
    if not series or cards.processes < 2:
        return {}
    without_access = max(series) >= _WITHOUT_PEER_ACCESS or not cards.reach_each_other
    joined_by_infiniband = cards.infiniband and cards.processes > cards.processes_here
    return {
        "NCCL_P2P_DISABLE": str(int(without_access)),
        # accelerate 1.15 wants both named with the 40 series, whatever they say.
        "NCCL_IB_DISABLE": str(int(not joined_by_infiniband)),
    }


def apply_settings() -> str | None:
    """Set the variables for this machine's cards, before the processes join; those of the user stay.

    Returns:
        A line that says what was set, or None.
    """
    if not torch.cuda.is_available():
        return None
    cards = _look()
    found = {name: value for name, value in settings_for(cards).items() if name not in os.environ}
    os.environ.update(found)
    switched_off = " ".join(f"{name}={value}" for name, value in found.items() if value == "1")
    if not switched_off:
        return None
    return (
        f"{switched_off} is set for {cards.names[0]}, as NCCL needs on consumer cards. Set these variables yourself "
        "(0 or 1) to decide otherwise."
    )


def _look() -> Cards:
    count = torch.cuda.device_count()
    pairs = [(one, other) for one in range(count) for other in range(count) if one != other]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return Cards(
        names=tuple(torch.cuda.get_device_name(index) for index in range(count)),
        reach_each_other=all(torch.cuda.can_device_access_peer(*pair) for pair in pairs),
        processes=processes,
        processes_here=int(os.environ.get("LOCAL_WORLD_SIZE", processes)),
        infiniband=_INFINIBAND.is_dir() and any(_INFINIBAND.iterdir()),
    )

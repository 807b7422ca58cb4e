"""What the machine has, for the command line and the launchers.

Run as a script it answers a launcher: ``python hardware.py 6001`` prints the kind of device (cpu or gpu),
the number of processes to start, the precision to train in, the number of CPU cores, and a free port (6001
itself, if it is free).
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the seconds that torch takes: no traceback

import torch

# GeForce RTX 4090, but not RTX 4000 Ada or RTX A6000, which are workstation cards with peer access.
_CONSUMER = re.compile(r"\bGeForce (?:RTX|GTX) (\d\d)\d\d\b")
# From this series on, GeForce cards have neither NVLink nor peer access over PCIe. Some drivers say that they do;
# NCCL then hangs or computes garbage (github.com/NVIDIA/nccl-tests/issues/117).
_WITHOUT_PEER_ACCESS = 40
_CONTROL_GROUP = Path("/sys/fs/cgroup")
_INFINIBAND = Path("/sys/class/infiniband")


def has_accelerator() -> bool:
    """Whether torch can compute on something other than the CPU."""
    return torch.accelerator.is_available()


def accelerator_count() -> int:
    """Number of accelerators this process may use; 0 on a CPU machine."""
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def best_precision() -> str:
    """The precision to train in: bf16 where the GPU computes it natively, else fp16; fp32 on a CPU.

    bf16 needs no loss scaling and can't overflow, but cards before Ampere only emulate it.
    """
    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def free_port(wanted: int) -> int:
    """The wanted TCP port if it is free, otherwise one that the system picks."""
    for port in (wanted, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise OSError("This machine has no free TCP port. Set MASTER_PORT to one that may be used.")


def cpu_cores() -> int:
    """CPU cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(*, on_cpu: bool) -> int:
    """Bytes that this process can still take: of its GPU, or of the RAM, which it shares with the others here."""
    if not on_cpu and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    import psutil  # of accelerate's; torch does not load it

    free = psutil.virtual_memory().available
    try:  # the limit of a container, whose files in memory can be dropped
        limit, used = (int((_CONTROL_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        kept = dict(line.split() for line in (_CONTROL_GROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(kept["inactive_file"]))
    except (OSError, ValueError, KeyError):  # there is no such file, or no limit
        pass
    return max(free, 0) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def data_workers(*, accelerator: bool) -> int:
    """How many processes per rank decode and cut images when the user gives no number.

    Beside a GPU, as many as there are free cores, up to 8: a worker cuts about ten photos of 1344 x 1008
    pixels per second. On a CPU the model needs the cores: two workers, or none with fewer than four cores.
    """
    share = cpu_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if accelerator:
        return max(min(share - 1, 8), 0)
    return 2 if share >= 4 else 0


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
    """The variables that NCCL needs with these cards; none with data-center cards or a single process.

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
    """Set the variables for this machine's cards before the processes join. Variables of the user stay.

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
        f"{switched_off} is set for {cards.names[0]}: NCCL needs it on consumer cards. Set these variables to 0 or 1 "
        "yourself to decide otherwise."
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


def main() -> None:
    """Print device, processes, precision, cores and port on one line."""
    count = accelerator_count()
    device = "gpu" if count else "cpu"
    port = free_port(int(sys.argv[1]))
    sys.stdout.write(f"{device} {max(1, count)} {best_precision()} {cpu_cores()} {port}\n")


if __name__ == "__main__":
    main()

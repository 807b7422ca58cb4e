"""What the machine has, for the command line and the launchers.

Run as a script it answers a launcher: ``python hardware.py 6001`` prints the kind of device (cpu or gpu),
the number of processes to start, the precision to train in, the number of CPU cores, and a port that is
free (6001 itself, if it is).
"""

from __future__ import annotations

import os
import socket
import sys


def has_accelerator() -> bool:
    """True when torch can compute on something other than the CPU."""
    import torch

    return torch.accelerator.is_available()


def accelerator_count() -> int:
    """Number of accelerators this process may use; 0 on a CPU machine."""
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def best_precision() -> str:
    """The precision to train in: bf16 where the GPU computes it natively, else fp16; fp32 on a CPU.

    bf16 needs no loss scaling and can't overflow, but cards before Ampere only emulate it.
    """
    import torch

    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def free_port(wanted: int) -> int:
    """The wanted TCP port, or one that the system picks when something listens there already."""
    for port in (wanted, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise OSError("no free TCP port on this machine; name one with MASTER_PORT.")


def process_rank() -> int:
    """This process's rank over all machines, as torchrun says it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def cpu_cores() -> int:
    """CPU cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def data_workers(*, accelerator: bool) -> int:
    """Processes per rank that decode and cut images, when the user names no number.

    Beside a GPU as many as there are cores for, up to 8: a worker cuts about ten photos of 1344 x 1008
    pixels in a second. On a CPU the cores are the model's, so two, and none where there are fewer than four.
    """
    share = cpu_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if accelerator:
        return max(min(share - 1, 8), 0)
    return 2 if share >= 4 else 0


def main() -> None:
    """Print device, processes, precision, cores and port on one line."""
    count = accelerator_count()
    device = "gpu" if count else "cpu"
    port = free_port(int(sys.argv[1]))
    sys.stdout.write(f"{device} {max(1, count)} {best_precision()} {cpu_cores()} {port}\n")


if __name__ == "__main__":
    main()

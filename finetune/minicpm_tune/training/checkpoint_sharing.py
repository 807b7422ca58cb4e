"""Output folders of their own on every machine: what only the first machine's checkpoint holds, for all."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import distributed

from minicpm_tune.output_folder import MANIFEST
from minicpm_tune.processes import gather

# Files of single processes; each lies on the machine of its process.
_OF_ONE_PROCESS = re.compile(r"rng_state_\d+\.pth|.*zero_pp_rank_\d+_.*")
_CHUNK = 2**26  # bytes sent at once


def fill_in(checkpoint: Path, *, writes: bool, device: torch.device) -> list[str]:
    """Bring a checkpoint's weights and states from rank 0's machine to those where they are missing.

    They are written once, on rank 0's machine, and travel only when a run is continued. Every process
    calls this.

    Args:
        checkpoint: The checkpoint, in this machine's folder.
        writes: Whether this process writes into it; one per folder does.
        device: Where the processes exchange tensors.

    Returns:
        What was missing on some machine.
    """
    here = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    views = gather((here, writes))
    shared = [name for name in sorted(views[0][0]) if name != MANIFEST]
    names = [name for name in shared if not _OF_ONE_PROCESS.fullmatch(Path(name).name)]
    missing = [name for name in names if any(name not in found for found, writer in views if writer)]
    for name in missing:
        _send(checkpoint / name, writes=writes and name not in here, device=device)
    return missing


def _send(path: Path, *, writes: bool, device: torch.device) -> None:
    """Send a file from rank 0 to all processes; those that lack it write it, under its name when it is whole."""
    first = distributed.get_rank() == 0
    size = gather(path.stat().st_size if first else None)[0]
    partial = path.with_name(f"{path.name}.partial")
    with ExitStack() as files:
        source = files.enter_context(path.open("rb")) if first else None
        if writes:
            partial.parent.mkdir(parents=True, exist_ok=True)
        target = files.enter_context(partial.open("wb")) if writes else None
        for start in range(0, size, _CHUNK):
            length = min(_CHUNK, size - start)
            chunk = torch.empty(length, dtype=torch.uint8, device=device)
            if source is not None:
                chunk.copy_(torch.frombuffer(bytearray(source.read(length)), dtype=torch.uint8))
            distributed.broadcast(chunk, src=0)
            if target is not None:
                target.write(chunk.cpu().numpy().tobytes())
    if writes:
        partial.replace(path)

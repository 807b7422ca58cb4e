"""The system's refusals to write something, told from faults of the program."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

GIB = 1024**3
_NOTHING = 2**24  # bytes; a disk with less is full
# What torch's writer says when the system did not take its bytes (torch 2.13); it raises RuntimeError.
_TORCH_WRITE_FAILURES = ("PytorchStreamWriter", "inline_container", "iostream error", "Parent directory")


def is_write_failure(error: Exception) -> bool:
    """Whether an error is the system's refusal to write: a full disk, no permission, a quota."""
    if isinstance(error, OSError):
        return True
    return isinstance(error, SafetensorError) or any(text in str(error) for text in _TORCH_WRITE_FAILURES)


def system_reason(error: Exception, folder: Path) -> tuple[str, int | None]:
    """The reason of a refusal in words, and its number where it is known.

    Args:
        error: What was raised.
        folder: Where it was to be written, or a folder that is not there yet.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and free_bytes(folder) < _NOTHING:
        number = errno.ENOSPC  # torch and safetensors don't pass on the system's reason
    return (os.strerror(number) if number else str(error).split("\n")[0]), number


def free_bytes(folder: Path) -> int:
    """Free space where a folder is, or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free

"""The cache folder: indexes of data files, converted files, and what checks of them found."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from minicpm_tune.errors import DataError

CACHE_VARIABLE = "MINICPMV_CACHE"
_FORMAT = 4  # raise it when the form of an index changes


def cache_file_of(path: Path, suffix: str) -> Path:
    """The cache file that belongs to a data file in its present state (path, size, time of change)."""
    return cache_file(file_state(path), suffix)


def file_state(path: Path) -> str:
    """A file's present state: path, size, time of change."""
    stat = path.stat()
    return f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"


def cache_file(state: str, suffix: str) -> Path:
    """The cache file that belongs to something in a state that a text describes."""
    return cache_folder() / (hashlib.sha256(f"{_FORMAT}|{state}".encode()).hexdigest()[:24] + suffix)


def cache_folder() -> Path:
    """The first of ``MINICPMV_CACHE``, the user's cache folder and a temporary folder that can be written to."""
    wish = os.environ.get(CACHE_VARIABLE)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    user = os.getuid() if hasattr(os, "getuid") else "user"
    temporary = Path(tempfile.gettempdir()) / f"minicpm-v-finetune-{user}"
    for folder in (Path(wish) if wish else Path(home) / "minicpm-v-finetune", temporary):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise DataError(
        f"indexes of data files: no folder can be written to (tried {temporary}). Set {CACHE_VARIABLE} to a writable "
        "folder."
    )


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that appears only when it is whole; several processes may do so at once."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise

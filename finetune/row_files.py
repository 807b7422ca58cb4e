"""Random access to the rows of a data file, without keeping them in memory.

A JSONL file is indexed once: the byte offset of every row, in a cache folder, found again by path, size and
modification time. A JSON list is written out once as JSONL into the same cache. Opening an indexed file of
a million rows takes milliseconds, and a worker holds no Python object per row.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

CACHE_VARIABLE = "MINICPMV_CACHE"


class DataError(ValueError):
    """A data file, or rows of it, that can't be trained on."""


class Rows(Protocol):
    """The rows of one data file."""

    path: Path

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def cache_folder() -> Path:
    """Where indexes are kept: $MINICPMV_CACHE, else the user's cache folder, else a temporary one."""
    wish = os.environ.get(CACHE_VARIABLE)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for folder in (Path(wish) if wish else Path(home) / "minicpm-v-finetune", _temporary()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise DataError(f"no folder for data indexes is writable. Set {CACHE_VARIABLE} to a folder that is.")


def _temporary() -> Path:
    return Path(tempfile.gettempdir()) / f"minicpm-v-finetune-{os.getuid() if hasattr(os, 'getuid') else 'user'}"


class JsonLines:
    """The rows of a JSONL file, or of a JSON list through its cached JSONL.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines_path, self._offsets_path = _index(path)
        self._offsets = np.load(self._offsets_path, mmap_mode="r")
        self._file: Any = None
        self._owner = 0

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: row {index} of {len(self)}")
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        if self._file is None or self._owner != os.getpid():  # a forked worker must not share the file position
            self._file = open(self._lines_path, "rb")  # noqa: SIM115 (kept open for the worker's life)
            self._owner = os.getpid()
        self._file.seek(start)
        return _parse_line(self._file.read(end - start), self.path, index)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]


def _parse_line(line: bytes, path: Path, index: int) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: row {index} is not valid JSON ({error}). {line[:80]!r}") from error


def _index(path: Path) -> tuple[Path, Path]:
    """Find or make the offsets of a file's rows; for a JSON list also its JSONL copy."""
    stat = path.stat()
    key = hashlib.sha256(f"2|{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:24]
    folder = cache_folder()
    offsets_path = folder / f"{key}.npy"
    copy_path = folder / f"{key}.jsonl"
    is_list = _starts_with_bracket(path)
    lines_path = copy_path if is_list else path
    if offsets_path.is_file() and lines_path.is_file():
        return lines_path, offsets_path
    if is_list:
        with _replacing(copy_path) as copy:
            offsets = _write_lines(_list_items(path), copy)
    else:
        offsets = _line_offsets(path)
    with _replacing(offsets_path) as file:
        np.save(file, np.asarray(offsets, dtype=np.int64))
    return lines_path, offsets_path


class _replacing:
    """A file that takes its place only when it is whole, so that ranks may write it at the same time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self):
        handle, self.temporary = tempfile.mkstemp(dir=self.path.parent, suffix=".part")
        self.file = os.fdopen(handle, "wb")
        return self.file

    def __exit__(self, kind, value, traceback) -> None:
        self.file.close()
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            os.unlink(self.temporary)


def _starts_with_bracket(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return head.startswith(b"[")


def _line_offsets(path: Path) -> list[int]:
    """Byte offsets of the rows of a JSONL file; blank lines at the end are no rows."""
    offsets = [0]
    blank_tail = 0
    position = 0
    with open(path, "rb") as file:
        for line in file:
            position += len(line)
            offsets.append(position)
            blank_tail = 0 if line.strip() else blank_tail + 1
    return offsets[: len(offsets) - blank_tail] if blank_tail else offsets


def _list_items(path: Path) -> Iterator[Any]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        yield from json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON ({error}).") from error


def _write_lines(items: Iterator[Any], file) -> list[int]:
    offsets = [0]
    position = 0
    for item in items:
        position += file.write(json.dumps(item, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        offsets.append(position)
    return offsets


def open_rows(path: str | Path) -> Rows:
    """Open a data file.

    Args:
        path: The file.

    Returns:
        Its rows.

    Raises:
        DataError: When there is no such file, or it is in no accepted format.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"{path}: no such file, expected a data file. Fix --data_path.")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty, expected rows. Fix --data_path.")
    return JsonLines(path)

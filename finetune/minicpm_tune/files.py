"""Files: written whole or not at all, read without running code, and kept in the cache folder.

The system's refusals are told apart from the program's faults. torch's pickles are read with a list of harmless
classes. Imports torch where it is used: ``refuse_pickles`` is called before anything slow.
"""

from __future__ import annotations

import copyreg
import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from minicpm_tune.errors import DataError, UserError

GIB = 1024**3
CACHE_VARIABLE = "MINICPMV_CACHE"
_CACHE_FORMAT = 4  # raise it when the form of an index changes
_NOTHING = 2**24  # bytes; a disk with less is full
_UMASK = os.umask(0o077)  # it can only be read by setting it
os.umask(_UMASK)
# What torch's writer says when the system did not take its bytes (torch 2.13); it raises RuntimeError.
_TORCH_WRITE_FAILURES = ("PytorchStreamWriter", "inline_container", "iostream error", "Parent directory")
# How torch speaks of a file that it can't make sense of (torch 2.13), in a RuntimeError.
_TORCH_READER = ("PytorchStreamReader", "legacy .tar format")


def is_write_failure(error: Exception) -> bool:
    """Whether an error is the system's refusal to write: a full disk, no permission, a quota."""
    told = any(text in str(error) for text in _TORCH_WRITE_FAILURES)
    return told or isinstance(error, OSError | SafetensorError)


def system_reason(error: Exception, folder: Path) -> tuple[str, int | None]:
    """The reason for a refusal in words, and its errno where it is known.

    Args:
        error: What was raised.
        folder: Where the file was to be written; it need not exist.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and free_bytes(folder) < _NOTHING:
        number = errno.ENOSPC  # torch and safetensors don't pass on the system's reason
    return (os.strerror(number) if number else str(error).split("\n")[0]), number


def free_bytes(folder: Path) -> int:
    """Free space where a folder is, or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


class OutputError(UserError):
    """An output that can't be written; the message says what to change."""


def check_new_folder(name: str) -> Path:
    """Check that a folder can be created, before hours of work go into what it will hold.

    Args:
        name: The folder (``--output_dir``); it may exist if it is empty.

    Raises:
        OutputError: When the folder holds something already, or can't be written to.
    """
    folder = Path(name).expanduser()
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(
                f"--output_dir {name}: the folder exists and is not empty, expected a new one. Give another name."
            )
        partial = _partial(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "probe").write_bytes(b"0")
        shutil.rmtree(partial)
    except OSError as error:
        raise _refused(folder, error, "--output_dir") from error
    return folder


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Write a folder under another name; it gets its own name when everything is written.

    Args:
        folder: From ``check_new_folder``.

    Raises:
        OutputError: When the system refuses to write; what was written is removed.
    """
    partial = _partial(folder)
    try:
        yield partial
        give_umask_mode(partial)
        if folder.is_dir():
            folder.rmdir()
        partial.rename(folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_write_failure(error):
            raise
        raise _refused(folder, error, "--output_dir") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def give_umask_mode(folder: Path) -> None:
    """Let those read saved weights who may read other new files; safetensors 0.8 lets only their owner."""
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o666 & ~_UMASK)


@contextmanager
def whole_file(name: str, *, flag: str) -> Iterator[IO[str]]:
    """Write a text file under another name first; it gets its own name when it is whole.

    Args:
        name: The file that the user named.
        flag: The flag it was named with.

    Raises:
        OutputError: When the system refuses to write; what was written is removed.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        raise OutputError(f"{flag} {name}: found a folder, expected a file. Name a file in it.")
    partial = _partial(path)
    try:
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        raise _refused(path, error, flag) from error
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _refused(folder: Path, error: Exception, flag: str) -> OutputError:
    reason, _ = system_reason(error, folder)
    return OutputError(
        f"{flag} {folder}: it can't be written: {reason}. {free_bytes(folder) / GIB:.1f} GiB are free there. Free some "
        "space, or give a folder where you may write. What had been written is removed."
    )


def write_json(path: Path, content: Any) -> None:
    """Write JSON as in the files of released models: indented by two, letters of all languages as they are."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def checked_size(text: str) -> str:
    """Check a size such as ``5GB`` for ``--max_shard_size``, as transformers reads it.

    Raises:
        OutputError: When it is not a size.

    Example:
        >>> checked_size("500MB")
        '500MB'
    """
    if not re.fullmatch(r"\d+(\.\d+)?(KB|MB|GB|TB)", text.upper()) or float(text[:-2]) == 0:
        raise OutputError(
            f"--max_shard_size {text}: expected a number with KB, MB, GB or TB. Write it as 5GB."
        )
    return text


class UnreadableFileError(UserError):
    """A damaged file, or one that holds something other than tensors."""


def refuse_pickles() -> None:
    """Make every ``torch.load`` of this process refuse anything but tensors and plain containers.

    Optimizer states are pickles, and a pickle can run any program. DeepSpeed asks torch to trust them
    (0.19); this variable overrules it (torch 2.13, ``torch/serialization.py``).
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


def allow_deepspeed_states() -> None:
    """Allow the four classes in DeepSpeed's own optimizer states; all of them are plain values."""
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler])
    # Python 3.11.0 to 3.11.3 write an Enum as a call of getattr, which no checkpoint may ask for; others as this.
    copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))


@contextmanager
def unreadable_files_as_messages(folder: str | Path | None) -> Iterator[None]:
    """Turn errors of torch and safetensors about a file into a message that names its folder.

    Args:
        folder: What is being read.

    Raises:
        UnreadableFileError: When a file is damaged, or is a pickle of something other than tensors.
    """
    try:
        yield
    except (pickle.UnpicklingError, SafetensorError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in _TORCH_READER):
            raise
        raise UnreadableFileError(
            f"{folder}: a file there is damaged, or holds something other than tensors, which is not loaded "
            f"({_reason(error)}). Download or copy the files again, or use others."
        ) from error


def _reason(error: Exception) -> str:
    """What was found, without torch's advice to load the file nevertheless."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    found = [line.strip() for line in lines if "Unsupported" in line]
    return (found or lines)[0].partition(" was not an allowed global")[0].partition(". In PyTorch 2.6")[0]


# --- the cache folder: indexes of data files, converted files, and what checks of them found ---


def file_state(path: Path) -> str:
    """A file's present state: path, size, time of change."""
    stat = path.stat()
    return f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"


def cache_file(state: str, suffix: str) -> Path:
    """The cache file that belongs to something in a state that a text describes."""
    return cache_folder() / (hashlib.sha256(f"{_CACHE_FORMAT}|{state}".encode()).hexdigest()[:24] + suffix)


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

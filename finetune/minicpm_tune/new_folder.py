"""The folder that a command writes a checkpoint to: new, checked before the work, and there only when whole."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from minicpm_tune.errors import UserError
from minicpm_tune.write_failures import GIB, free_bytes, is_write_failure, system_reason


class OutputError(UserError):
    """A place that can't be written to; the message says what to change."""


def check_new_folder(name: str, *, flag: str = "--output_dir") -> Path:
    """See that a folder can be made, before hours of work go into what it is to hold.

    Args:
        name: The folder; an empty one may be there.
        flag: How the command line calls it.

    Raises:
        OutputError: When something is there already, or nothing can be written there.
    """
    folder = Path(name).expanduser()
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(
                f"{flag} {name}: it exists and is not empty, expected a new folder. Give another one."
            )
        partial = _partial(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "probe").write_bytes(b"0")
        shutil.rmtree(partial)
    except OSError as error:
        raise _refused(folder, error, flag) from error
    return folder


@contextmanager
def whole_folder(folder: Path, *, flag: str = "--output_dir") -> Iterator[Path]:
    """Give the name under which to write; the folder gets its own name when all is written.

    Args:
        folder: From ``check_new_folder``.
        flag: How the command line calls it.

    Raises:
        OutputError: When the system refuses to write; what was written is removed.
    """
    partial = _partial(folder)
    try:
        yield partial
        if folder.is_dir():
            folder.rmdir()
        partial.rename(folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_write_failure(error):
            raise
        raise _refused(folder, error, flag) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def _refused(folder: Path, error: Exception, flag: str) -> OutputError:
    reason, _ = system_reason(error, folder)
    return OutputError(
        f"{flag} {folder}: it can't be written: {reason}. {free_bytes(folder) / GIB:.1f} GiB are free there. Free "
        "space, or give a folder where you may write; nothing is left of this attempt."
    )


def checked_size(text: str) -> str:
    """A size such as ``5GB`` for ``--max_shard_size``, as transformers reads it.

    Raises:
        OutputError: When it is none.

    Example:
        >>> checked_size("500MB")
        '500MB'
    """
    if not re.fullmatch(r"\d+(\.\d+)?(KB|MB|GB|TB)", text.upper()) or float(text[:-2]) == 0:
        raise OutputError(
            f"--max_shard_size {text}: expected a number with KB, MB, GB or TB. Write it as 5GB."
        )
    return text

"""What a process says: one root logger, shown on the screen and kept in the run's log files, without library noise."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from minicpm_tune import processes

ROOT = "minicpm_tune"  # the one logger that the project's own loggers stand below
LOG_ONLY = f"{ROOT}.log_only"  # a logger that writes to the process's log and not to the screen

# Patterns of how warnings begin.
_WARNINGS = (
    "`torch.jit.script_method` is deprecated",
    "`is_gradient_checkpointing` is deprecated",
    "The PEFT config's `base_model_name_or_path` was renamed",
    r"`torch\.distributed\.\w+` is deprecated",  # DeepSpeed 0.19 calls them once per parameter
    "Detected pickle protocol",  # before torch's error about the same file, which becomes a message (2.13)
)
# Logger -> how its messages begin.
_MESSAGES = {"DeepSpeed": "Setting accelerator to CPU."}
# Advice for GPUs: packages of faster kernels that don't run on a CPU (transformers 5.23).
_FOR_GPUS = {
    "transformers.integrations.hub_kernels": "is falling back to its reference PyTorch implementation"
}


def silence_libraries() -> None:
    """Keep out lines that help nobody; call before torch's friends are imported, and again after set-up of logging."""
    # It says on every CPU, when peft imports it, that a faster kernel could be downloaded (0.50).
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name in (*_MESSAGES, *_FOR_GPUS):
        logger = logging.getLogger(name)
        if _is_wanted not in logger.filters:
            logger.addFilter(_is_wanted)
    for text in _WARNINGS:
        warnings.filterwarnings("ignore", message=text)
    # Read by tqdm when it is imported: no bar for work of less than a second, none in a file, and one of all processes.
    os.environ.setdefault("TQDM_DELAY", "1")
    if not sys.stderr.isatty() or processes.rank() > 0:
        os.environ.setdefault("TQDM_DISABLE", "1")


def _is_wanted(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    if record.name in _MESSAGES:
        return not message.startswith(_MESSAGES[record.name])
    import torch  # only for these lines; the logs are there before torch

    return _FOR_GPUS[record.name] not in message or torch.cuda.is_available()


def log_to_screen(*, first: bool) -> None:
    """Show log lines on the screen.

    Args:
        first: Whether this is the run's first process; the others show only warnings of their own.
    """
    sys.stdout, sys.stderr = _LastingStream.around(sys.stdout), _LastingStream.around(sys.stderr)
    screen = _Screen(sys.stderr)
    screen.setFormatter(logging.Formatter("%(message)s"))
    screen.setLevel(logging.INFO if first else logging.WARNING)
    screen.addFilter(lambda record: record.name != LOG_ONLY)
    logging.basicConfig(level=logging.WARNING, handlers=[screen], force=True)
    logging.getLogger(ROOT).setLevel(logging.INFO)
    silence_libraries()


def log_to_file(path: Path) -> IO[str]:
    """Write log lines to a file too, those of transformers included; give the open file."""
    import transformers  # takes seconds, and is loaded by now where there is a run

    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    transformers.utils.logging.add_handler(handler)
    logging.raiseExceptions = False  # a disk that is full for a moment must not spoil the screen
    assert handler.stream is not None  # opened at once, without ``delay``
    return handler.stream


class _Screen(logging.StreamHandler):
    """Writes lines above a progress bar, not into it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # only where a bar may be on the screen

        tqdm.write(self.format(record), file=self.stream)


class _LastingStream:
    """A stream that drops what can't be written: a terminal that was closed must not end a run.

    Args:
        stream: Standard output or standard error.
    """

    def __init__(self, stream: IO[str]):
        self._stream = stream

    @classmethod
    def around(cls, stream: Any) -> Any:
        """The stream, made lasting; one that is already stays as it is."""
        return stream if isinstance(stream, cls) else cls(stream)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return self._drop(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop("")

    def _drop(self, text: str) -> int:
        # The same for libraries in C, and for what is left in the buffer.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

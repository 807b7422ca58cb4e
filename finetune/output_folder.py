"""What an output folder already holds, and what a new run may do with it.

A folder with a model at its top holds a finished run; one with only ``checkpoint-<step>`` folders holds
an interrupted one. Neither is touched unless the user says so, because a new run would mix its
checkpoints with the old ones, and a later resume could not tell them apart.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

_MODEL_FILE = re.compile(
    r"(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
)
_STATE_FILE = "trainer_state.json"


@dataclass(frozen=True)
class EarlierRun:
    """What was found in an output folder.

    Attributes:
        finished: A model or adapter lies at its top.
        last_checkpoint: The checkpoint with the highest step that was written to its end, if any.
    """

    finished: bool
    last_checkpoint: Path | None

    def __bool__(self) -> bool:
        """True when there is anything of an earlier run."""
        return self.finished or self.last_checkpoint is not None


def look(folder: str | Path) -> EarlierRun:
    """Tell what an output folder holds of an earlier run; a folder that does not exist holds nothing."""
    folder = Path(folder)
    if not folder.is_dir():
        return EarlierRun(finished=False, last_checkpoint=None)
    return EarlierRun(finished=bool(_model_files(folder)), last_checkpoint=_last_checkpoint(folder))


def is_checkpoint(folder: str | Path) -> bool:
    """True for a checkpoint folder that was written to its end.

    The Trainer writes ``trainer_state.json`` after the weights and the optimizer.
    """
    return (Path(folder) / _STATE_FILE).is_file()


def clear(folder: str | Path) -> list[Path]:
    """Delete what an earlier run left: its checkpoints and the model at the top, nothing else.

    Call on one rank, before training starts.

    Returns:
        What was deleted.
    """
    folder = Path(folder)
    checkpoints = [path for _, path in _checkpoints(folder)]
    files = _model_files(folder)
    for path in checkpoints:
        shutil.rmtree(path)
    for path in files:
        path.unlink()
    return checkpoints + files


def _model_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if _MODEL_FILE.fullmatch(path.name))


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def _last_checkpoint(folder: Path) -> Path | None:
    complete = [path for _, path in _checkpoints(folder) if is_checkpoint(path)]
    return complete[-1] if complete else None

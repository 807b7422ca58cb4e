"""What the output folder of a training run holds: its checkpoints, and the model or adapter at the end.

A folder with a model at its top holds a finished run; one with only ``checkpoint-<step>`` folders holds
an interrupted one. Neither is touched unless the user asks for it: a new run would mix its checkpoints
with the old ones, and a later resume could not tell them apart.

A checkpoint is written in ``unfinished/`` and moved to its place when complete, together with a list of
its files and their sizes. What lies in its place was therefore complete once, and later damage shows.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

UNFINISHED = "unfinished"  # the folder in which checkpoints are written
MANIFEST = "checkpoint.json"  # lists a checkpoint's files, and describes the run that wrote it
STATE_FILE = "trainer_state.json"
LOGS = "logs"  # folder in the output folder
LOCK_FILE = "run.lock"  # in it: locked while a run goes on, its text says whose it is
RUN_RECORD = "run.json"  # at the top of the folder: what each start of the run was given
_MODEL_FILE = re.compile(
    r"(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
)
# What stands beside the weights. An export does not overwrite them, so those of another base would stay.
_BESIDE_MODEL = re.compile(
    r"(config|generation_config|adapter_config|base_model|tokenizer|tokenizer_config|special_tokens_map|added_tokens|"
    r"vocab|chat_template|preprocessor_config|video_preprocessor_config|processor_config)\.json|"
    r"tokenizer\.model|merges\.txt|chat_template\.jinja|"
    r"(configuration|modeling|tokenization|processing|image_processing)_\w+\.py|(resampler|build_mlp|ixc_utils)\.py"
)


@dataclass(frozen=True)
class EarlierRun:
    """What was found in an output folder.

    Attributes:
        finished: Whether a model or adapter lies at its top.
        last_checkpoint: The last complete checkpoint, if any.
    """

    finished: bool
    last_checkpoint: Path | None

    def __bool__(self) -> bool:
        """True when there is anything of an earlier run."""
        return self.finished or self.last_checkpoint is not None


def find_earlier_run(folder: str | Path) -> EarlierRun:
    """Look for an earlier run in an output folder, which need not exist."""
    folder = Path(folder)
    whole = [path for _, path in list_checkpoints(folder) if is_checkpoint(path)]
    return EarlierRun(finished=bool(_model_files(folder)), last_checkpoint=whole[-1] if whole else None)


def find_user(folder: str | Path) -> str | None:
    """The run that is using an output folder now, in words; None when none is."""
    try:
        with (Path(folder) / LOGS / LOCK_FILE).open("r+", encoding="utf-8") as file:
            return None if lock(file) else file.read().strip() or "unknown"
    except OSError:  # there is none, or the file system has no locks
        return None


def lock(file: IO[str]) -> bool:
    """Lock a file for this process until it is closed; False when another process has done so.

    Raises:
        OSError: Where the file system has no locks.
    """
    try:
        # A record lock: unlike flock's, it is not inherited by the workers that load data.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def in_use(folder: str | Path, user: str) -> str:
    """The message about a folder that another run is using."""
    return (
        f"--output_dir {str(folder)!r} is in use by another run ({user}). Give another folder, or wait until that run "
        "has ended."
    )


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder is a complete checkpoint."""
    return find_damage(folder) is None


def find_damage(folder: str | Path) -> str | None:
    """Say what is wrong with a checkpoint folder; None when it is complete.

    Sizes are compared, not contents: that finds what a full disk, a killed copy or a lost file leaves
    behind. A checkpoint of transformers' own Trainer has no list of files; it counts as complete when it
    has a ``trainer_state.json``, which is written last.

    Args:
        folder: A ``checkpoint-<step>`` folder.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return None if (folder / STATE_FILE).is_file() else f"no {STATE_FILE}"
    try:
        files = read_manifest(folder)["files"]
    except (ValueError, KeyError):
        return f"{MANIFEST} is cut short"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
    return None


def read_manifest(checkpoint: str | Path) -> dict[str, Any]:
    """Read a checkpoint's manifest; empty for a checkpoint of transformers' own Trainer."""
    path = Path(checkpoint) / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def list_checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """Steps and folders of all checkpoints, complete or not, in the order of their steps."""
    paths = Path(folder).glob("checkpoint-*")
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in paths]
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def remove_old_checkpoints(
    folder: str | Path, *, keep: int | None, best: str | Path | None = None
) -> list[Path]:
    """Delete the oldest checkpoints; only complete ones count, so that the last of these always stays.

    Args:
        folder: The output folder.
        keep: How many to keep, from 1; None or 0 keeps all.
        best: A checkpoint to keep in any case; it counts.

    Returns:
        What was deleted. Damaged checkpoints older than the kept ones are deleted too.
    """
    found = list_checkpoints(folder)
    whole = [path for _, path in found if is_checkpoint(path)]
    if not keep or len(whole) <= keep:
        return []
    kept = {whole[-1], *(path for path in whole if best is not None and path == Path(best))}
    for path in reversed(whole):
        if len(kept) >= keep:
            break
        kept.add(path)
    oldest_kept = min(step for step, path in found if path in kept)
    gone = [path for step, path in found if path not in kept and (path in whole or step < oldest_kept)]
    for path in gone:
        shutil.rmtree(path)
    return gone


def remove_earlier_run(folder: str | Path) -> list[Path]:
    """Delete an earlier run's checkpoints and the model at the top with its small files, and nothing else.

    Call on one rank, before training starts.

    Returns:
        What was deleted.
    """
    folder = Path(folder)
    folders = [path for _, path in list_checkpoints(folder)]
    if (folder / UNFINISHED).is_dir():
        folders.append(folder / UNFINISHED)
    files = _model_files(folder)
    if files:
        files += sorted(path for path in folder.glob("*") if _BESIDE_MODEL.fullmatch(path.name))
    for path in folders:
        shutil.rmtree(path)
    for path in files:
        path.unlink()
    return folders + files


def _model_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if _MODEL_FILE.fullmatch(path.name))

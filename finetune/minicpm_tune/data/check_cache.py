"""What the check of a large data file found, stored beside the file's index.

Checking a row takes a fraction of a millisecond, a million rows some minutes. The findings are found again
by everything they depend on: the file (path, size, time of change), the checkpoint's tokenizer and rules, the
options, and this program's own files. Whether images are still there is not asked of every row again: all rows
that had problems and a sample of the others are looked at, and one that is worse than before has the whole
file checked anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from minicpm_tune.data.bad_rows import BadRow
from minicpm_tune.data.files.cache import cache_file, file_state, written_whole
from minicpm_tune.data.samples import Processing, TrainingRows

STORED_FROM = 5000  # rows; fewer are checked within seconds
_LOOKED_AT = 500  # good rows that are looked at again
_MOST_BAD = 20_000  # with more, looking at all of them again is no gain
_LIBRARIES = ("Pillow", "tokenizers", "transformers")


@dataclass(frozen=True)
class Finding:
    """What the check saw in a row.

    Attributes:
        length: Its length in tokens; 1, that of a padding sample, when it can't be used.
        bad: Its problem, if it has one.
        dropped: Whether the user asked to leave such rows out.
        notes: What is odd about it and no problem, see ``row_check.row_notes``.
        id_hash: Stands for its ``id``; 0 without one.
    """

    length: int
    bad: BadRow | None = None
    dropped: bool = False
    notes: tuple[str, ...] = ()
    id_hash: int = 0


@dataclass
class FileCheck:
    """The findings of one data file.

    Attributes:
        lengths: Every row's length in tokens, int32 [rows].
        bad: The findings of rows with problems, by their number in the file.
        notes: How many rows have each note.
    """

    lengths: np.ndarray
    bad: dict[int, Finding]
    notes: dict[str, int] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Store it, unless most of it would have to be looked at again."""
        if len(self.lengths) < STORED_FROM or len(self.bad) > _MOST_BAD:
            return
        bad = [(row, asdict(finding)) for row, finding in self.bad.items()]
        text = json.dumps({"bad": bad, "notes": self.notes}, default=str)
        with written_whole(path) as file:
            np.savez(file, lengths=self.lengths, rest=np.frombuffer(text.encode(), dtype=np.uint8))

    @classmethod
    def load(cls, path: Path) -> FileCheck | None:
        """Read what was stored; None when nothing was."""
        if not path.is_file():
            return None
        with np.load(path) as content:
            lengths, rest = content["lengths"], json.loads(content["rest"].tobytes())
        bad = {row: _finding(values) for row, values in rest["bad"]}
        return cls(lengths, bad, rest["notes"])


def _finding(values: dict[str, Any]) -> Finding:
    bad, notes = values.pop("bad"), tuple(values.pop("notes"))
    return Finding(bad=None if bad is None else BadRow(**bad), notes=notes, **values)


Look = Callable[[TrainingRows, int], Finding]


def stored_checks(rows: TrainingRows, look: Look, *, decoded: bool) -> dict[int, FileCheck]:
    """The stored findings that still hold, by the file's number.

    Args:
        rows: The data set.
        look: Checks one row.
        decoded: Whether the check decodes images.
    """
    found = {}
    for number, file in enumerate(rows.mixture.files):
        if len(file.rows) < STORED_FROM:
            continue
        check = FileCheck.load(check_path(rows, number, decoded=decoded))
        if check is not None and _still_holds(check, rows, rows.mixture.first_row(number), look):
            found[number] = check
    return found


def _still_holds(check: FileCheck, rows: TrainingRows, first: int, look: Look) -> bool:
    """Look at rows again; what has become better is corrected."""
    for row in list(check.bad):
        now = look(rows, first + row)
        if now.bad is None:
            check.lengths[row] = now.length
            del check.bad[row]
    places = np.linspace(0, len(check.lengths) - 1, _LOOKED_AT, dtype=np.int64).tolist()
    again = ((row, look(rows, first + row)) for row in places if row not in check.bad)
    return all(found.bad is None and found.length == check.lengths[row] for row, found in again)


def check_path(rows: TrainingRows, number: int, *, decoded: bool) -> Path:
    """Where the findings of a file are stored, in the present state of everything they depend on."""
    # Neither the names of the files, nor what happens to bad rows, nor a row's side changes what is found.
    arguments = replace(
        rows.processing.arguments, data_path=None, eval_data_path=None, on_bad_row="skip", eval_split=None,
        max_samples=None, eval_max_samples=None,
    )  # fmt: skip
    parts = [
        _program(), _checkpoint_state(rows.processing), repr(arguments), str(decoded),
        str(len(rows.mixture.files[number].rows)),
        *(file_state(path) for path in rows.mixture.files[number].rows.files),
    ]  # fmt: skip
    return cache_file("|".join(parts), ".check.npz")


@lru_cache(maxsize=1)
def _program() -> str:
    """The code and the libraries that decide what the check of a row finds."""
    digest = hashlib.sha256()
    for room in ("checkpoints", "data", "settings"):
        for path in sorted((Path(__file__).parents[1] / room).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest() + "|".join(version(name) for name in _LIBRARIES)


def _checkpoint_state(processing: Processing) -> str:
    tokenizer, media = processing.tokenizer, processing.media
    text = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    slicing = {name: value for name, value in vars(media.slicing).items() if not name.startswith("_")}
    state = (processing.generation.name, slicing, media.style, media.video, media.downsample_mode)
    return hashlib.sha256(text.encode()).hexdigest() + repr(state)

"""What the check of a large data file found, kept beside the file's index.

Checking a row takes a fraction of a millisecond, a million rows some minutes. The findings are found again
by everything they depend on: the file (path, size, time of change), the checkpoint's tokenizer and rules, the
options, and this program's own files. Whether images are still there is not asked of every row again: all rows
that had problems and a sample of the others are looked at, and one that is worse than before has the whole
file checked anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minicpm_tune.data.bad_rows import BadRow
from minicpm_tune.data.files.index_cache import kept_file, replacing, state_of

if TYPE_CHECKING:
    from dataset import SupervisedDataset

KEPT_FROM = 5000  # rows; fewer are checked within seconds
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
    """

    length: int
    bad: BadRow | None = None
    dropped: bool = False


@dataclass
class FileCheck:
    """The findings of one data file.

    Attributes:
        lengths: Every row's length in tokens, int32 [rows].
        bad: The findings of rows with problems, by their number in the file.
    """

    lengths: np.ndarray
    bad: dict[int, Finding]

    def save(self, path: Path) -> None:
        """Keep it, unless most of it would have to be looked at again."""
        if len(self.lengths) < KEPT_FROM or len(self.bad) > _MOST_BAD:
            return
        text = json.dumps([(row, asdict(finding)) for row, finding in self.bad.items()], default=str)
        with replacing(path) as file:
            np.savez(file, lengths=self.lengths, bad=np.frombuffer(text.encode(), dtype=np.uint8))

    @classmethod
    def load(cls, path: Path) -> FileCheck | None:
        """Read what was kept; None when nothing was."""
        if not path.is_file():
            return None
        with np.load(path) as content:
            lengths, text = content["lengths"], content["bad"].tobytes()
        bad = {row: _finding(values) for row, values in json.loads(text)}
        return cls(lengths, bad)


def _finding(values: dict[str, Any]) -> Finding:
    bad = values.pop("bad")
    return Finding(bad=None if bad is None else BadRow(**bad), **values)


def kept_checks(
    rows: SupervisedDataset, look: Callable[[SupervisedDataset, int], Finding], *, decoded: bool
) -> dict[int, FileCheck]:
    """The kept findings that still hold, by source number.

    Args:
        rows: The data set.
        look: Checks one row.
        decoded: Whether the check decodes images.
    """
    found = {}
    for number, first in _sources(rows):
        check = FileCheck.load(check_path(rows, number, decoded=decoded))
        if check is not None and _still_holds(check, rows, first, look):
            found[number] = check
    return found


def _sources(rows: SupervisedDataset) -> Iterator[tuple[int, int]]:
    first = 0
    for number, source in enumerate(rows.sources):
        if len(source.rows) >= KEPT_FROM:
            yield number, first
        first += len(source.rows)


def _still_holds(
    check: FileCheck,
    rows: SupervisedDataset,
    first: int,
    look: Callable[[SupervisedDataset, int], Finding],
) -> bool:
    """Look at rows again; what has become better is corrected."""
    for row in list(check.bad):
        now = look(rows, first + row)
        if now.bad is None:
            check.lengths[row] = now.length
            del check.bad[row]
    places = np.linspace(0, len(check.lengths) - 1, _LOOKED_AT, dtype=np.int64).tolist()
    return all(
        row in check.bad or look(rows, first + row) == Finding(int(check.lengths[row])) for row in places
    )


def check_path(rows: SupervisedDataset, number: int, *, decoded: bool) -> Path:
    """Where the findings of a source are kept, in the present state of everything they depend on."""
    parts = [
        _program(), _of_the_checkpoint(rows), repr(replace(rows.options, on_bad_row="skip")), str(decoded),
        *(state_of(path) for path in rows.sources[number].rows.files),
    ]  # fmt: skip
    return kept_file("|".join(parts), ".check.npz")


@lru_cache(maxsize=1)
def _program() -> str:
    """This program's own files and the libraries that decide what a row's check finds."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[2].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest() + "|".join(version(name) for name in _LIBRARIES)


def _of_the_checkpoint(rows: SupervisedDataset) -> str:
    processing = rows.processing
    tokenizer = processing.tokenizer
    text = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    rules = {name: value for name, value in vars(processing.rules).items() if not name.startswith("_")}
    state = (
        processing.generation.name, rules, processing.style, processing.writer.options, processing.video,
        processing.downsample_mode,
    )  # fmt: skip
    return hashlib.sha256(text.encode()).hexdigest() + repr(state)

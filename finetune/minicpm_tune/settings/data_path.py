"""The grammar of ``--data_path``: one file, several, or a mixture with exact counts.

``--data_path`` takes one path; several, separated by commas, each with an optional ``#count`` or ``:weight``; or a
text file (``.txt``) with one source per line:

    # path, and thousands of samples per epoch (a fraction is fine)
    cats.json 1.5
    "my dogs.jsonl" 0.2
    birds.parquet#300        exactly 300 samples
    fish.json:0.5            half of its rows; 2 means every row twice
    rest.json                every row once
"""

from __future__ import annotations

import glob
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from minicpm_tune.errors import DataError

_AMOUNT = re.compile(r"(?P<path>.+?)(?:#(?P<count>\d+)|:(?P<weight>\d*\.?\d+))", re.DOTALL)


@dataclass(frozen=True)
class MixtureSource:
    """A data file and how much of it an epoch holds.

    Attributes:
        path: The file or folder.
        count: Samples per epoch, or ``None``.
        weight: Samples per epoch as a share of its rows, or ``None``; with neither, every row once.
    """

    path: Path
    count: int | None = None
    weight: float | None = None

    def samples(self, rows: int) -> int:
        """Samples per epoch of a file with so many rows."""
        if self.count is not None:
            return self.count
        return rows if self.weight is None else round(self.weight * rows)


def read_data_path(text: str) -> list[MixtureSource]:
    """Parse ``--data_path``.

    Args:
        text: A path, several with commas between them, or the path of a mixture file.

    Returns:
        The sources.

    Raises:
        DataError: When a mixture file can't be read, or an amount is no number.

    Example:
        >>> read_data_path("cats.json#500,dogs.json:0.5")[1]
        MixtureSource(path=PosixPath('dogs.json'), count=None, weight=0.5)
    """
    whole = Path(text).expanduser()
    if whole.suffix == ".txt":
        return _read_mixture_file(whole)
    if whole.exists() or "," not in text:
        return [_source(text)]
    return [_source(part.strip()) for part in text.split(",") if part.strip()]


def missing_sources(text: str) -> list[Path]:
    """The paths in ``--data_path`` that do not exist; a pattern with ``*`` must match at least one file."""
    paths = [source.path for source in read_data_path(text)]
    return [path for path in paths if not path.exists() and not glob.glob(str(path))]


def _source(text: str) -> MixtureSource:
    path = Path(text).expanduser()
    found = _AMOUNT.fullmatch(text)
    if path.exists() or not found:
        return MixtureSource(path)
    path = Path(found["path"]).expanduser()
    if found["count"] is not None:
        return MixtureSource(path, count=int(_positive(int(found["count"]), text)))
    return MixtureSource(path, weight=_positive(float(found["weight"]), text))


def _positive(amount: float, text: str) -> float:
    if amount <= 0:
        raise DataError(
            f"--data_path {text}: found the amount {amount}, expected more than 0. Remove the source."
        )
    return amount


def _read_mixture_file(path: Path) -> list[MixtureSource]:
    if path.is_dir():
        raise DataError(
            f"--data_path {path}: found a folder, expected a mixture file. Rename the folder, or give the files in it."
        )
    if not path.is_file():
        raise DataError(f"--data_path {path}: no such file, expected a mixture file. Fix the path.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"--data_path {path}: not UTF-8 text ({error}). Save the file as UTF-8.") from error
    sources = [source for number, line in enumerate(lines, 1) if (source := _read_line(line, path, number))]
    if not sources:
        raise DataError(
            f"--data_path {path}: found no source, expected lines of a path and an amount. Add one."
        )
    return sources


def _read_line(line: str, file: Path, number: int) -> MixtureSource | None:
    try:
        words = _words(line)
    except ValueError as error:
        raise DataError(
            f"{file}, line {number}: {error} in {line!r}. Quote the path on both sides."
        ) from error
    if not words:
        return None
    if len(words) > 2:
        raise DataError(
            f"{file}, line {number}: found {len(words)} words in {line!r}, expected a path and thousands of samples. "
            "Quote a path that has spaces."
        )
    source = _source(words[0])
    if len(words) == 2:
        source = MixtureSource(source.path, count=_thousands(words[1], f"{file}, line {number}"))
    if not source.path.is_absolute() and (file.parent / source.path).exists():
        return MixtureSource(file.parent / source.path, source.count, source.weight)
    return source


def _words(line: str) -> list[str]:
    """The words of a line, as a shell splits them; a backslash escapes only where one stands before a space.

    Elsewhere it belongs to a Windows path.
    """
    splitter = shlex.shlex(line, posix=True)
    splitter.whitespace_split, splitter.commenters = True, ""
    splitter.escape = "\\" if "\\ " in line else ""
    words = list(splitter)
    comment = next((index for index, word in enumerate(words) if word.startswith("#")), len(words))
    return words[:comment]


def _thousands(word: str, place: str) -> int:
    try:
        count = round(float(word) * 1000)
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise DataError(
            f"{place}: found {word!r}, expected thousands of samples per epoch, at least 0.001. Write 1.5 for 1500."
        )
    return count

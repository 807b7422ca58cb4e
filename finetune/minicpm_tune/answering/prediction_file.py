"""The output file of a batch prediction: one JSON object per line, written so that a stopped run can continue.

A single process appends to the file itself. Of several, each appends to a part of its own; the parts are joined, in
the order of the rows, when all have ended, or when the next run starts.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minicpm_tune.answering.metrics import mean_scores
from minicpm_tune.errors import UserError
from minicpm_tune.files import system_reason

Line = dict[str, Any]
_ESCAPED = "backslashreplace"  # half an emoji, in a row's id say, becomes the \\u escape that JSON knows


class PredictionFileError(UserError):
    """An output file that belongs to another run, or can't be written."""


class PredictionFile:
    """The lines of one output file.

    Args:
        path: The file.
        rank: This process's number.
        world: How many processes write.
    """

    def __init__(self, path: Path, *, rank: int = 0, world: int = 1) -> None:
        self.path, self.rank, self.world = path, rank, world
        self.own = path if world == 1 else _part(path, rank)

    @property
    def settings_path(self) -> Path:
        """Where the run's settings are kept, and its scores when it has ended."""
        return self.path.with_name(self.path.name + ".summary.json")

    @property
    def bad_rows_path(self) -> Path:
        """Where rows that can't be answered are listed."""
        return self.path.with_name(self.path.name + ".bad_rows.jsonl")

    def prepare(self, settings: Line, *, overwrite: bool) -> None:
        """Join the parts of a stopped run and drop a half-written line; one process does so before any other reads.

        Args:
            settings: What decides the answers: model, data, options.
            overwrite: Whether to start over.

        Raises:
            PredictionFileError: When the file was written with other settings, or can't be written.
        """
        if self.path.is_dir():
            raise PredictionFileError(
                f"--output {self.path}: found a folder, expected a file to write. Name a file in it."
            )
        with self.writing():
            self._prepare(settings, overwrite=overwrite)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn the system's refusal to write into a message.

        Raises:
            PredictionFileError: With the system's reason; the lines written so far stay.
        """
        try:
            yield
        except OSError as error:
            reason, _ = system_reason(error, self.path.parent)
            raise PredictionFileError(
                f"--output {self.path}: can't be written: {reason}. Free some space, or name a file in a folder you "
                "may write to. The same command then continues with the rows that are not answered yet."
            ) from error

    def _prepare(self, settings: Line, *, overwrite: bool) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        parts = [self.path, *self._parts()]
        if overwrite:
            for path in (*parts, self.settings_path):
                path.unlink(missing_ok=True)
        elif any(path.is_file() for path in parts):
            self._check(settings)
        self.bad_rows_path.unlink(missing_ok=True)  # the rows in it are looked at again
        self._join()
        _write_whole(self.settings_path, _dump({"settings": settings}, indent=2))

    def _check(self, settings: Line) -> None:
        if not self.settings_path.is_file():
            raise PredictionFileError(
                f"--output {self.path}: the file exists, but {self.settings_path.name} does not, so nobody can tell "
                "which model wrote it. Name another file, or start over with --overwrite true."
            )
        known = json.loads(self.settings_path.read_text(encoding="utf-8"))["settings"]
        changed = [name for name in settings if known.get(name) != settings[name]]
        if changed:
            name = changed[0]
            raise PredictionFileError(
                f"--output {self.path}: the lines in it were written with {name} {known.get(name)!r}, but now it is "
                f"{settings[name]!r}. Name another file, or start over with --overwrite true."
            )

    def done(self) -> list[Line]:
        """The lines written so far."""
        return read_lines(self.path)

    def append(self, lines: Iterable[Line]) -> None:
        """Write lines, and wait until they are on the disk."""
        with self.writing(), self.own.open("a", encoding="utf-8", errors=_ESCAPED) as file:
            file.writelines(_dump(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> tuple[list[Line], dict[str, float]]:
        """Join the parts and keep the mean scores; one process does so after all have written.

        Returns:
            All lines, in the order of the rows, and the scores.
        """
        with self.writing():
            lines = self._join()
            scores = mean_scores(line["scores"] for line in lines if line["scores"])
            kept = json.loads(self.settings_path.read_text(encoding="utf-8"))
            kept |= {"rows": len(lines), "scores": scores}
            _write_whole(self.settings_path, _dump(kept, indent=2))
        return lines, scores

    def _join(self) -> list[Line]:
        """Put the lines of the file and of all parts into the file; give them in the order of the rows."""
        parts = self._parts()
        lines = [line for path in (self.path, *parts) for line in read_lines(path)]
        lines.sort(key=lambda line: line["row"])
        _write_whole(self.path, "".join(_dump(line) + "\n" for line in lines))
        for path in parts:
            path.unlink()
        return lines

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.rank*"))


def read_lines(path: Path) -> list[Line]:
    """The complete lines of a file; a half-written last line is left out.

    Raises:
        PredictionFileError: When another line is not a prediction.
    """
    if not path.is_file():
        return []
    lines = []
    *whole, _ = path.read_bytes().split(b"\n")  # what follows the last newline is nothing, or half a line
    for number, piece in enumerate(whole, start=1):
        try:
            line = json.loads(piece)
            lines.append({**line, "row": int(line["row"])})
        except (ValueError, KeyError, TypeError) as error:
            raise PredictionFileError(
                f"{path}: line {number} is not a prediction ({error!r}), expected a JSON object with 'row'. Name "
                "another --output, or start over with --overwrite true."
            ) from error
    return lines


def _write_whole(path: Path, text: str) -> None:
    """Write a file under another name first, so that nobody ever finds half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors=_ESCAPED)
    partial.replace(path)


def _part(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.name}.rank{rank}")


def _dump(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)

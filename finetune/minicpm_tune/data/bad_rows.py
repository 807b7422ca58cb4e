"""Rows that can't be used: counted, and listed with their place and reason."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minicpm_tune.data.files.row_files import Mixture
from minicpm_tune.data.row_keys import type_name
from minicpm_tune.errors import RowError

logger = logging.getLogger(__name__)

FILE_NAME = "bad_rows.jsonl"
SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class BadRow:
    """One row that can't be used.

    Attributes:
        file: The data file.
        row: Its number in the file, counted from 0.
        id: Its ``id``, if it has one.
        kind: The problem in a word or two; the same for all rows with it.
        reason: What was found, what was expected, and what to do.
    """

    file: str
    row: int
    id: Any
    kind: str
    reason: str

    @classmethod
    def of(cls, mixture: Mixture, index: int, error: RowError) -> BadRow:
        """A row of the run's files, by its number through all of them."""
        source, row = mixture.origin(index)
        try:
            value: Any = mixture.read(index)
        except RowError:
            value = None
        row_id = value.get("id") if isinstance(value, dict) else None
        if not isinstance(row_id, (str, int, float, type(None))):
            row_id = type_name(row_id)
        return cls(mixture.names[source], row, row_id, error.kind, str(error))

    def __str__(self) -> str:
        name = f" (id {self.id!r:.80})" if self.id is not None else ""
        return f"{self.file}: row {self.row}{name}: {self.reason}"


def problems_text(problems: Sequence[BadRow], total: int) -> str:
    """The first problems and their number."""
    shown = "".join(f"\n  {problem}" for problem in problems[:SHOWN_PROBLEMS])
    more = len(problems) - SHOWN_PROBLEMS
    return (
        f"{len(problems)} of {total} rows can't be used:{shown}"
        + (f"\n  ... and {more} more" if more > 0 else "")
        + "\nFix them (finetune/inspect_data.py lists all), or pass --on_bad_row skip to leave them out."
    )


class BadRowLog:
    """Collects bad rows, also from worker processes, in a file.

    Args:
        path: The file, one JSON object per line; ``None`` only counts in this process.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._seen: set[tuple[str, int]] = set()

    def add(self, bad: BadRow) -> None:
        """Note a bad row; a second time is no matter."""
        if (bad.file, bad.row) in self._seen:
            return
        self._seen.add((bad.file, bad.row))
        if self.path is None:
            return
        line = json.dumps(asdict(bad), ensure_ascii=False, default=str) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One write on a file opened for appending: lines of several workers don't mix.
            with self.path.open("ab", buffering=0) as file:
                file.write(line.encode("utf-8", "replace"))
        except OSError as error:  # a full disk: the run may outlive it
            logger.warning("%s was not written: %s. It is about %s", self.path, error, bad)

    def read(self) -> list[dict[str, Any]]:
        """Every bad row in the file, each once (workers and ranks may have met the same)."""
        if self.path is None or not self.path.is_file():
            return []
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                bad = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut short when the disk was full
            found.setdefault((bad["file"], bad["row"]), bad)
        return list(found.values())

    def summary(self) -> str:
        """One line for the end of a run: how many rows were left out, and why."""
        bad = self.read()
        if not bad:
            return "bad rows: none"
        kinds = Counter(row["kind"] for row in bad)
        named = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        return f"bad rows: {len(bad)} contributed nothing ({named}); listed in {self.path}"

"""The check of a whole data set before training: every row, shared by all ranks, without a model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from minicpm_tune import processes
from minicpm_tune.data.bad_rows import BadRow
from minicpm_tune.data.check_cache import FileCheck, Finding, check_path, stored_checks
from minicpm_tune.data.samples import TrainingRows
from minicpm_tune.errors import DataError, DroppedRowError, RowError

logger = logging.getLogger(__name__)

SHOWN_PROBLEMS = 20
_ROWS_PER_TASK = 32
_FEW_ROWS = 400  # starting processes takes longer than checking these
FEW_ROWS_TO_DECODE = 500  # seconds; a larger data set would hold up the training


class _Task(Dataset):
    """Does something with chosen rows, for a DataLoader's workers."""

    def __init__(
        self, rows: TrainingRows, indices: Sequence[int], work: Callable[[TrainingRows, int], Any]
    ) -> None:
        self.rows, self.indices, self.work = rows, indices, work

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Any:
        return self.work(self.rows, self.indices[place])


def for_rows(
    rows: TrainingRows,
    indices: Sequence[int],
    work: Callable[[TrainingRows, int], Any],
    *,
    title: str,
    workers: int | None = None,
) -> Iterator[Any]:
    """Do something with many rows, in order and in parallel, with a progress bar.

    Args:
        rows: The data set.
        indices: The rows.
        work: A top-level function of the data set and a row number; its result should be small.
        title: What the progress bar says.
        workers: Processes; ``None`` chooses by the machine and the number of rows.

    Yields:
        The results, in the order of ``indices``.
    """
    few = len(indices) < _FEW_ROWS
    if workers is None:
        workers = 0 if few else _free_cores()
    loader = DataLoader(
        _Task(rows, indices, work), batch_size=_ROWS_PER_TASK, num_workers=workers, collate_fn=list
    )
    hidden = few or processes.rank() != 0
    with tqdm(total=len(indices), desc=title, unit=" rows", disable=hidden, mininterval=1) as progress:
        for results in loader:
            yield from results
            progress.update(len(results))


def _free_cores() -> int:
    """Cores for this process's workers; 0 where it would be a single one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = min(cores // processes.local_world_size(), 16)
    return share if share > 1 else 0


def check_row(rows: TrainingRows, index: int) -> Finding:
    """Check one row: form, roles, placeholders, files, image headers, length, something to learn."""
    try:
        return Finding(len(rows.plan(index).encoded.input_ids))
    except RowError as error:
        return Finding(1, rows.describe(index, error), isinstance(error, DroppedRowError))


def decode_row(rows: TrainingRows, index: int) -> Finding:
    """Check one row as ``check_row`` does, and decode its images and videos as well."""
    try:
        plan = rows.plan(index)
        for picture in plan.pictures:
            for _ in picture.frames():
                pass
    except RowError as error:
        return Finding(1, rows.describe(index, error), isinstance(error, DroppedRowError))
    return Finding(len(plan.encoded.input_ids))


def check_rows(rows: TrainingRows, *, workers: int | None = None) -> np.ndarray:
    """Check every row; with several ranks each checks its share, and all come to the same result.

    Images are first looked at by their headers only, so that most mistakes show within seconds; then, as
    ``check_images`` says, they are decoded.

    Args:
        rows: The data set; rows that may be left out are marked in it.
        workers: Processes per rank; ``None`` chooses by the machine and the number of rows.

    Returns:
        Every row's length in tokens, int32.

    Raises:
        DataError: On every rank, with the first twenty problems and their number, unless ``on_bad_row`` is
            ``skip``.
    """
    how = rows.processing.arguments.check_images
    decodes = how == "full" or (how == "auto" and rows.mixture.row_count <= FEW_ROWS_TO_DECODE)
    lengths, bad, rest = _read_stored(rows, decodes)
    _leave_out_or_raise(rows, bad)
    works = {"checking rows": check_row} | ({"decoding images": decode_row} if decodes else {})
    new: dict[int, Finding] = {}
    for title, work in works.items() if len(rest) else ():
        lengths[rest], new = _check_shared(rows, rest, work, title=title, workers=workers)
        _leave_out_or_raise(rows, bad | new)
    if len(rest) and processes.joined()[0] == 0:
        _store(rows, lengths, new, rest, decoded=decodes)
    return lengths


def _read_stored(rows: TrainingRows, decodes: bool) -> tuple[np.ndarray, dict[int, Finding], np.ndarray]:
    """What earlier checks found: lengths and bad rows by row number, and the rows still to be checked.

    The first process reads it for all, so that they agree, and none but it looks at rows twice.
    """
    found = None
    if processes.joined()[0] == 0:
        found = stored_checks(rows, decode_row if decodes else check_row, decoded=decodes)
    found = processes.gather(found)[0]
    lengths = np.ones(rows.mixture.row_count, dtype=np.int32)
    to_check = np.ones(rows.mixture.row_count, dtype=bool)
    bad: dict[int, Any] = {}
    for number, check in found.items():
        first = rows.mixture.first_row(number)
        place = slice(first, first + len(check.lengths))
        lengths[place], to_check[place] = check.lengths, False
        bad |= {first + row: finding for row, finding in check.bad.items()}
        if processes.joined()[0] == 0:
            logger.info("%s: checked before, and unchanged since", rows.mixture.names[number])
    return lengths, bad, np.flatnonzero(to_check)


def _store(
    rows: TrainingRows,
    lengths: np.ndarray,
    bad: dict[int, Finding],
    checked: np.ndarray,
    *,
    decoded: bool,
) -> None:
    """Keep what was found in files that were checked just now."""
    for number, file in enumerate(rows.mixture.files):
        first, count = rows.mixture.first_row(number), len(file.rows)
        if first in checked:
            own = {row - first: finding for row, finding in bad.items() if first <= row < first + count}
            FileCheck(lengths[first : first + count], own).save(check_path(rows, number, decoded=decoded))


def _check_shared(
    rows: TrainingRows,
    indices: np.ndarray,
    work: Callable[[TrainingRows, int], Finding],
    *,
    title: str,
    workers: int | None,
) -> tuple[np.ndarray, dict[int, Finding]]:
    """Have every rank do its share of some rows; give the lengths of all and the bad ones to each."""
    rank, ranks = processes.joined()
    share = indices[rank::ranks].tolist()
    lengths = np.ones(len(share), dtype=np.int32)
    bad: dict[int, Finding] = {}
    for place, finding in enumerate(for_rows(rows, share, work, title=title, workers=workers)):
        lengths[place] = finding.length
        if finding.bad:
            bad[share[place]] = finding
    parts = processes.gather((lengths, bad))
    lengths = np.ones(len(indices), dtype=np.int32)
    for number, (part, _) in enumerate(parts):
        lengths[number::ranks] = part
    bad = {row: found[row] for _, found in parts for row in found}
    return lengths, {row: bad[row] for row in sorted(bad)}


def _leave_out_or_raise(rows: TrainingRows, bad: dict[int, Finding]) -> None:
    """Raise, or have the bad rows left out and listed."""
    first = processes.rank() == 0
    problems = [finding.bad for finding in bad.values() if finding.bad and not finding.dropped]
    dropped = len(bad) - len(problems)
    if problems and rows.processing.arguments.on_bad_row == "error":
        raise DataError(problems_text(problems, rows.mixture.row_count))
    for index, finding in bad.items():
        rows.leave_out(index)
        if first and finding.bad:
            rows.bad_rows.add(finding.bad)
    if len(bad) == rows.mixture.row_count:
        raise DataError(
            f"{problems_text(problems, rows.mixture.row_count)}\n{dropped} were dropped as over-long. No row is left "
            "to train on."
        )
    if bad and first:
        logger.warning(
            "%d of %d rows are left out, %d of them as over-long", len(bad), rows.mixture.row_count, dropped
        )


def problems_text(problems: Sequence[BadRow], total: int) -> str:
    """The first problems and their number."""
    shown = "".join(f"\n  {problem}" for problem in problems[:SHOWN_PROBLEMS])
    more = len(problems) - SHOWN_PROBLEMS
    return (
        f"{len(problems)} of {total} rows can't be used:{shown}"
        + (f"\n  ... and {more} more" if more > 0 else "")
        + "\nFix them (finetune/inspect_data.py lists all), or pass --on_bad_row skip to leave them out."
    )

"""The check of a whole data set before training: every row, shared by all ranks, without a model."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from minicpm_tune import processes
from minicpm_tune.data.bad_rows import BadRow
from minicpm_tune.data.check_cache import FileCheck, Finding, check_path, stored_checks
from minicpm_tune.data.row_parsing import ParsedRow
from minicpm_tune.data.samples import TrainingRows
from minicpm_tune.data.turns import media_of
from minicpm_tune.errors import DataError, DroppedRowError, RowError

logger = logging.getLogger(__name__)

SHOWN_PROBLEMS = 20
UNKNOWN_KEY, EMPTY_ANSWER, DUPLICATE_ID = "unknown key: ", "empty answer", "duplicate id"
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
    return _check(rows, index, decode=False)


def decode_row(rows: TrainingRows, index: int) -> Finding:
    """Check one row as ``check_row`` does, and decode its images and videos as well."""
    return _check(rows, index, decode=True)


def _check(rows: TrainingRows, index: int, *, decode: bool) -> Finding:
    try:
        row = rows.parse(index)
        plan = rows.processing.plan(row.turns, rows.open_media(index, row.sources))
        for picture in plan.pictures if decode else ():
            for _ in picture.frames():
                pass
    except RowError as error:
        return Finding(1, rows.describe(index, error), isinstance(error, DroppedRowError))
    return Finding(len(plan.encoded.input_ids), notes=tuple(row_notes(row)), id_hash=_hash(row.row_id))


def row_notes(row: ParsedRow) -> list[str]:
    """What is odd about a row that can be used: keys that nothing reads, an answer without text.

    Example:
        >>> from minicpm_tune.data.row_parsing import parse_row
        >>> row_notes(parse_row({"license": "MIT", "messages": [
        ...     {"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]}))
        ["unknown key: row 'license'", 'empty answer']
    """
    notes = [f"{UNKNOWN_KEY}{key}" for key in row.unknown_keys]
    answers = [turn for turn in row.turns if turn.role == "assistant" and turn.weight]
    if any(not turn.text.strip() and not media_of([turn]) for turn in answers):
        notes.append(EMPTY_ANSWER)
    return notes


def _hash(row_id: Any) -> int:
    if not isinstance(row_id, (str, int, float)):
        return 0
    return (
        int.from_bytes(hashlib.blake2b(repr(row_id).encode("utf-8", "replace"), digest_size=7).digest()) + 1
    )


def check_rows(rows: TrainingRows, *, workers: int | None = None) -> np.ndarray:
    """Check every row; with several ranks each checks its share, and all come to the same result.

    Images are first looked at by their headers only, so that most mistakes show within seconds; then, as
    ``check_images`` says, they are decoded. What is odd and no problem is logged once, with counts.

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
    stored = _stored(rows, decodes)
    lengths = np.ones(rows.mixture.row_count, dtype=np.int32)
    to_check = np.ones(rows.mixture.row_count, dtype=bool)
    bad: dict[int, Finding] = {}
    for number, check in stored.items():
        first = rows.mixture.first_row(number)
        place = slice(first, first + len(check.lengths))
        lengths[place], to_check[place] = check.lengths, False
        bad |= {first + row: finding for row, finding in check.bad.items()}
    _leave_out_or_raise(rows, bad)
    rest = np.flatnonzero(to_check)
    works = {"checking rows": check_row} | ({"decoding images": decode_row} if decodes else {})
    found = _Findings(lengths[rest], {}, np.zeros(len(rest), dtype=np.int64), {})
    for title, work in works.items() if len(rest) else ():
        found = _check_shared(rows, rest, work, title=title, workers=workers)
        _leave_out_or_raise(rows, bad | found.bad)
    lengths[rest] = found.lengths
    if processes.joined()[0] == 0:
        _log_left_out(bad | found.bad, rows.mixture.row_count)
        new = _by_file(rows, rest, lengths, found)
        for number, check in new.items():
            check.save(check_path(rows, number, decoded=decodes))
        _log_notes([*stored.values(), *new.values()])
    return lengths


def _stored(rows: TrainingRows, decodes: bool) -> dict[int, FileCheck]:
    """What earlier checks found and still holds, by the file's number.

    The first process reads it for all, so that they agree, and none but it looks at rows twice.
    """
    found = None
    if processes.joined()[0] == 0:
        found = stored_checks(rows, decode_row if decodes else check_row, decoded=decodes)
        for number in found:
            logger.info("%s: checked before, and unchanged since", rows.mixture.names[number])
    found = processes.gather(found)[0]
    assert found is not None
    return found


@dataclass
class _Findings:
    """What a check found in some rows.

    Attributes:
        lengths: Their lengths in tokens, int32 [rows].
        bad: The findings of those with problems, by row number.
        id_hashes: [rows] int64, see ``Finding``.
        notes: The notes of those that have any, by row number.
    """

    lengths: np.ndarray
    bad: dict[int, Finding]
    id_hashes: np.ndarray
    notes: dict[int, tuple[str, ...]]


def _check_shared(
    rows: TrainingRows,
    indices: np.ndarray,
    work: Callable[[TrainingRows, int], Finding],
    *,
    title: str,
    workers: int | None,
) -> _Findings:
    """Have every rank do its share of some rows, and give what all found to each."""
    rank, ranks = processes.joined()
    share = indices[rank::ranks].tolist()
    own = _Findings(np.ones(len(share), dtype=np.int32), {}, np.zeros(len(share), dtype=np.int64), {})
    seen: dict[tuple[str, ...], tuple[str, ...]] = {}  # rows share their notes: most have the same
    for place, finding in enumerate(for_rows(rows, share, work, title=title, workers=workers)):
        own.lengths[place], own.id_hashes[place] = finding.length, finding.id_hash
        if finding.bad:
            own.bad[share[place]] = finding
        if finding.notes:
            own.notes[share[place]] = seen.setdefault(finding.notes, finding.notes)
    parts = processes.gather(own)
    lengths, id_hashes = np.ones(len(indices), dtype=np.int32), np.zeros(len(indices), dtype=np.int64)
    for number, part in enumerate(parts):
        lengths[number::ranks], id_hashes[number::ranks] = part.lengths, part.id_hashes
    bad = {row: finding for part in parts for row, finding in part.bad.items()}
    notes = {row: note for part in parts for row, note in part.notes.items()}
    return _Findings(lengths, {row: bad[row] for row in sorted(bad)}, id_hashes, notes)


def _by_file(
    rows: TrainingRows, checked: np.ndarray, lengths: np.ndarray, found: _Findings
) -> dict[int, FileCheck]:
    """What was found in the files that were checked just now, by the file's number."""
    checks = {}
    for number, file in enumerate(rows.mixture.files):
        first = rows.mixture.first_row(number)
        end = first + len(file.rows)
        places = np.flatnonzero((checked >= first) & (checked < end))
        if not len(places):
            continue
        notes = Counter(note for row in checked[places].tolist() for note in found.notes.get(row, ()))
        hashes, counts = np.unique(found.id_hashes[places], return_counts=True)
        if twice := int(counts[(counts > 1) & (hashes != 0)].sum()):
            notes[DUPLICATE_ID] = twice
        bad = {row - first: finding for row, finding in found.bad.items() if first <= row < end}
        checks[number] = FileCheck(lengths[first:end], bad, dict(notes))
    return checks


def _log_left_out(bad: dict[int, Finding], total: int) -> None:
    dropped = sum(finding.dropped for finding in bad.values())
    if bad:
        logger.warning("%d of %d rows are left out, %d of them as over-long", len(bad), total, dropped)


def _log_notes(checks: Iterable[FileCheck]) -> None:
    """Log what is odd about the rows, once and with counts."""
    notes: Counter[str] = Counter()
    for check in checks:
        notes.update(check.notes)
    unknown = [(note, count) for note, count in notes.most_common() if note.startswith(UNKNOWN_KEY)]
    if unknown:
        listed = ", ".join(
            f"{note.removeprefix(UNKNOWN_KEY)} ({count} rows)" for note, count in unknown[:SHOWN_PROBLEMS]
        )
        more = f" and {len(unknown) - SHOWN_PROBLEMS} more" if len(unknown) > SHOWN_PROBLEMS else ""
        logger.warning(
            "Keys that nothing reads: %s%s. Check that they don't change what a row means.", listed, more
        )
    if notes[EMPTY_ANSWER]:
        logger.warning("%d rows have an empty answer: they teach to say nothing.", notes[EMPTY_ANSWER])
    if notes[DUPLICATE_ID]:
        logger.warning("%d rows share their 'id' with another row of the same file.", notes[DUPLICATE_ID])


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


def problems_text(problems: Sequence[BadRow], total: int) -> str:
    """The first problems and their number."""
    shown = "".join(f"\n  {problem}" for problem in problems[:SHOWN_PROBLEMS])
    more = len(problems) - SHOWN_PROBLEMS
    return (
        f"{len(problems)} of {total} rows can't be used:{shown}"
        + (f"\n  ... and {more} more" if more > 0 else "")
        + "\nFix them (finetune/inspect_data.py lists all), or pass --on_bad_row skip to leave them out."
    )

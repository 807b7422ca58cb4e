"""The check of a whole data set before training: every row, shared by all ranks, without a model.

Checking a row takes a fraction of a millisecond, a million rows some minutes. So what was found in a large file is
stored beside its index, and found again by everything it depends on: the file (path, size, time of change), the
checkpoint's tokenizer and rules, the options, and this program's own files. Whether images are still there is not
asked of every row again: all rows that had problems and a sample of the others are looked at, and one that is worse
than before has the whole file checked anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from minicpm_tune import processes
from minicpm_tune.data.bad_rows import SHOWN_PROBLEMS, BadRow, problems_text
from minicpm_tune.data.row_parsing import ParsedRow
from minicpm_tune.data.samples import Processing, TrainingRows
from minicpm_tune.data.turns import media_of
from minicpm_tune.errors import DataError, DroppedRowError, RowError
from minicpm_tune.files import cache_file, file_state, written_whole

logger = logging.getLogger(__name__)

UNKNOWN_KEY, EMPTY_ANSWER, DUPLICATE_ID = "unknown key: ", "empty answer", "duplicate id"
_ROWS_PER_TASK = 32
_FEW_ROWS = 400  # starting processes takes longer than checking these
FEW_ROWS_TO_DECODE = 500  # seconds; a larger data set would hold up the training
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
        notes: What is odd about it and no problem, see ``row_notes``.
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
        bad = {row: _finding(**values) for row, values in rest["bad"]}
        return cls(lengths, bad, rest["notes"])


def _finding(bad: dict[str, Any] | None, notes: Sequence[str], **rest: Any) -> Finding:
    return Finding(bad=BadRow(**bad) if bad else None, notes=tuple(notes), **rest)


Work = Callable[[TrainingRows, int], Any]  # on the row of that number


def for_rows(
    rows: TrainingRows, indices: Sequence[int], work: Work, *, title: str, workers: int | None = None
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
    numbers: Any = indices  # a sequence is all that the loader asks of a data set
    do = partial(_work_on, rows, work)
    loader = DataLoader(numbers, batch_size=_ROWS_PER_TASK, num_workers=workers, collate_fn=do)
    hidden = few or processes.rank() != 0
    with tqdm(total=len(indices), desc=title, unit=" rows", disable=hidden, mininterval=1) as progress:
        for results in loader:
            yield from results
            progress.update(len(results))


def _work_on(rows: TrainingRows, work: Work, indices: Sequence[int]) -> list[Any]:
    return [work(rows, index) for index in indices]


def _free_cores() -> int:
    """Cores for this process's workers; 0 where it would be a single one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = min(cores // processes.local_world_size(), 16)
    return share if share > 1 else 0


def check_row(rows: TrainingRows, index: int, *, decode: bool = False) -> Finding:
    """Check one row: form, roles, placeholders, files, image headers, length, something to learn.

    With ``decode`` its images and videos are decoded as well.
    """
    try:
        row = rows.parse(index)
        plan = rows.processing.plan(row.turns, rows.open_media(index, row.sources))
        for picture in plan.pictures if decode else ():
            for _ in picture.frames():
                pass
    except RowError as error:
        return Finding(1, rows.describe(index, error), isinstance(error, DroppedRowError))
    return Finding(len(plan.encoded.input_ids), notes=tuple(row_notes(row)), id_hash=_hash(row.row_id))


decode_row = partial(check_row, decode=True)


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
    digest = hashlib.blake2b(repr(row_id).encode("utf-8", "replace"), digest_size=7).digest()
    return int.from_bytes(digest) + 1


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
    found = _Findings.none(len(rest))
    for title, work in works.items() if len(rest) else ():
        found = _check_shared(rows, rest, work, title=title, workers=workers)
        _leave_out_or_raise(rows, bad | found.bad)
    lengths[rest] = found.lengths
    bad |= found.bad
    if processes.joined()[0] == 0:
        if bad:
            dropped = sum(finding.dropped for finding in bad.values())
            logger.warning(
                "%d of %d rows are left out, %d of them as over-long", len(bad), len(lengths), dropped
            )
        new = _by_file(rows, rest, lengths, found)
        for number, check in new.items():
            check.save(check_path(rows, number, decoded=decodes))
        _log_notes([*stored.values(), *new.values()])
    return lengths


def _stored(rows: TrainingRows, decodes: bool) -> dict[int, FileCheck]:
    """What earlier checks found and still holds, by the file's number.

    The first process reads it for all, so that they agree, and none but it looks at rows twice.
    """
    found: dict[int, FileCheck] = {}
    for number, file in enumerate(rows.mixture.files) if processes.joined()[0] == 0 else ():
        if len(file.rows) < STORED_FROM:
            continue
        check = FileCheck.load(check_path(rows, number, decoded=decodes))
        look = decode_row if decodes else check_row
        if check is not None and _still_holds(check, rows, rows.mixture.first_row(number), look):
            logger.info("%s: checked before, and unchanged since", rows.mixture.names[number])
            found[number] = check
    return processes.gather(found)[0]


def _still_holds(check: FileCheck, rows: TrainingRows, first: int, look: Work) -> bool:
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
    file = rows.mixture.files[number].rows
    parts = [_program(), _checkpoint_state(rows.processing), repr(arguments), str(decoded), str(len(file))]
    return cache_file("|".join([*parts, *map(file_state, file.files)]), ".check.npz")


@cache
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

    @classmethod
    def none(cls, count: int) -> _Findings:
        """Of so many rows, before they are checked."""
        return cls(np.ones(count, dtype=np.int32), {}, np.zeros(count, dtype=np.int64), {})


def _check_shared(
    rows: TrainingRows, indices: np.ndarray, work: Work, *, title: str, workers: int | None
) -> _Findings:
    """Have every rank do its share of some rows, and give what all found to each."""
    rank, ranks = processes.joined()
    share = indices[rank::ranks].tolist()
    own = _Findings.none(len(share))
    seen: dict[tuple[str, ...], tuple[str, ...]] = {}  # rows share their notes: most have the same
    for place, finding in enumerate(for_rows(rows, share, work, title=title, workers=workers)):
        own.lengths[place], own.id_hashes[place] = finding.length, finding.id_hash
        if finding.bad:
            own.bad[share[place]] = finding
        if finding.notes:
            own.notes[share[place]] = seen.setdefault(finding.notes, finding.notes)
    every = _Findings.none(len(indices))
    for number, part in enumerate(processes.gather(own)):
        every.lengths[number::ranks], every.id_hashes[number::ranks] = part.lengths, part.id_hashes
        every.bad |= part.bad
        every.notes |= part.notes
    every.bad = {row: every.bad[row] for row in sorted(every.bad)}
    return every


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


def _log_notes(checks: Iterable[FileCheck]) -> None:
    """Log what is odd about the rows, once and with counts."""
    notes = sum((Counter(check.notes) for check in checks), Counter())
    unknown = [(note, count) for note, count in notes.most_common() if note.startswith(UNKNOWN_KEY)]
    if unknown:
        shown = unknown[:SHOWN_PROBLEMS]
        listed = ", ".join(f"{note.removeprefix(UNKNOWN_KEY)} ({count} rows)" for note, count in shown)
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
    problems = [finding.bad for finding in bad.values() if finding.bad and not finding.dropped]
    dropped = len(bad) - len(problems)
    if problems and rows.processing.arguments.on_bad_row == "error":
        raise DataError(problems_text(problems, rows.mixture.row_count))
    for index, finding in bad.items():
        rows.left_out.add(index)
        if finding.bad and processes.rank() == 0:
            rows.bad_rows.add(finding.bad)
    if len(bad) == rows.mixture.row_count:
        raise DataError(
            f"{problems_text(problems, rows.mixture.row_count)}\n{dropped} were dropped as over-long. No row is left "
            "to train on."
        )

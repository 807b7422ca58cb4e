"""A batch prediction: the rows of a data file as questions, the model's answers, and the file they are written to.

The file holds one JSON object per line and is written so that a stopped run can continue.
"""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from minicpm_tune import processes
from minicpm_tune.answering.generate import answer
from minicpm_tune.answering.metrics import (
    BOX_METRICS,
    ERROR_RATES,
    METRICS,
    box_scores,
    corpus_scores,
    count_edits,
    score,
)
from minicpm_tune.batch import Sample
from minicpm_tune.data.bad_rows import BadRow, problems_text
from minicpm_tune.data.files.row_forms import as_conversation
from minicpm_tune.data.media.sources import check_source
from minicpm_tune.data.objects import Box, Ref
from minicpm_tune.data.row_parsing import ParsedRow
from minicpm_tune.data.samples import TrainingRows
from minicpm_tune.data.turns import Turn, media_of
from minicpm_tune.errors import DataError, RowError, UserError
from minicpm_tune.files import system_reason

logger = logging.getLogger(__name__)

_USER_ROLES = ("user", "human")
_ESCAPED = "backslashreplace"  # half an emoji, in a row's id say, becomes the \\u escape that JSON knows

Line = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """One row as a question: everything in front of its last answer, and that answer.

    Attributes:
        row: Its number in the data.
        row_id: The row's ``id``, or None.
        text: The last question, as text.
        answer: The row's last answer; None for a row that ends with a question.
        prompt: What the model is given.
        metrics: What its answer is compared by: names of ``METRICS``, ``BOX_METRICS`` and ``ERROR_RATES``.
    """

    row: int
    row_id: Any
    text: str
    answer: str | None
    prompt: Sample
    metrics: tuple[str, ...]


class PredictionRows:
    """The rows of a data set, as questions. Its ``--on_bad_row`` says what happens to rows that can't be answered.

    Args:
        rows: The data set.
        thinking: Whether the model is asked to think first; None: as the rows are trained.
        system_prompt: Put in front of rows without a system turn; empty for none.
        metrics: What answers are compared by; None: error rates only where the row has audio, the others always;
            those of boxes need an expected answer with boxes.
    """

    def __init__(
        self,
        rows: TrainingRows,
        *,
        thinking: bool | None = None,
        system_prompt: str = "",
        metrics: Sequence[str] | None = None,
    ) -> None:
        self.rows, self.metrics = rows, metrics
        self.processing = rows.processing
        self.skips_bad = rows.processing.arguments.on_bad_row == "skip"
        self.thinking, self.system_prompt = thinking, system_prompt

    def __len__(self) -> int:
        return self.rows.mixture.row_count

    def __getitem__(self, index: int) -> Question:
        """The question of a row.

        Raises:
            DataError: When it can't be answered.
        """
        try:
            return self._question(index)
        except RowError as error:
            raise DataError(str(self.rows.describe(index, error))) from error

    def question_or_none(self, index: int) -> Question | None:
        """The question of a row; None for a bad row where the data set leaves such rows out, which are then listed.

        Raises:
            DataError: When it can't be answered, and bad rows are errors.
        """
        try:
            return self._question(index)
        except RowError as error:
            bad = self.rows.describe(index, error)
            if not self.skips_bad:
                raise DataError(f"{bad}\n(--on_bad_row skip leaves such rows out.)") from error
            logger.warning("left out: %s", bad)
            self.rows.bad_rows.add(bad)
            return None

    def check(self, indices: Sequence[int]) -> list[int]:
        """Look at rows before a model is loaded; images are looked for, but not decoded.

        Returns:
            The rows that can be answered.

        Raises:
            DataError: With the first twenty problems and their number, when bad rows are errors.
        """
        bad = {index: problem for index in indices if (problem := self._problem(index))}
        if bad and not self.skips_bad:
            raise DataError(problems_text(list(bad.values()), len(indices)))
        for problem in bad.values():
            self.rows.bad_rows.add(problem)
        return [index for index in indices if index not in bad]

    def _problem(self, index: int) -> BadRow | None:
        try:
            row = self._parse(index)
            turns: Sequence[Turn] = row.turns
            if _has_boxes(row):  # whether they fit is known only with the pictures' sizes
                turns = self.processing.with_boxes_written(turns, self.rows.open_media(index, row.sources))
            self.processing.check(turns)
            images = self.rows.image_options(index)
            for source in row.sources:
                if source.kind == "image":
                    check_source(source.value, images.folder, allow_remote=images.allow_remote)
        except RowError as error:
            return self.rows.describe(index, error)
        return None

    def _parse(self, index: int) -> ParsedRow:
        row = as_conversation(self.rows.mixture.read(index), answered=False)
        return self.processing.parse(_with_answer(row))

    def _question(self, index: int) -> Question:
        row = self._parse(index)
        *turns, last = row.turns
        if _has_boxes(row):
            pictures = self.rows.open_media(index, row.sources)
            *turns, last = self.processing.with_boxes_written(row.turns, pictures)
        if self.system_prompt and turns[0].role != "system":
            turns.insert(0, Turn("system", (self.system_prompt,)))
        sources = [row.sources[media.index] for media in media_of(turns)]
        pictures = self.rows.open_media(index, sources)
        prompt = self.processing.encode_prompt(turns, pictures, thinking=self.thinking)
        metrics = self.metrics
        if metrics is None:
            metrics = (*METRICS, *BOX_METRICS, *(ERROR_RATES if "audio_values" in prompt else ()))
        return Question(index, row.row_id, turns[-1].text.strip(), last.text or None, prompt, tuple(metrics))

    def picture(self, index: int) -> Image.Image | None:
        """The row's first picture, or first frame, in mode RGB; None for a row without."""
        seen = [source for source in self._parse(index).sources if source.kind != "audio"]
        for picture in self.rows.open_media(index, seen[:1]):
            return next(iter(picture.frames()))
        return None


def _has_boxes(row: ParsedRow) -> bool:
    return any(isinstance(part, (Ref, Box)) for turn in row.turns for part in turn.parts)


def _with_answer(row: Any) -> Any:
    """A row that ends with a question gets an empty answer, so that it can be read like the others."""
    if not isinstance(row, Mapping):
        return row
    for key in ("conversations", "messages"):
        messages = row.get(key)
        if isinstance(messages, list) and messages and isinstance(messages[-1], Mapping):
            if messages[-1].get("role", messages[-1].get("from")) in _USER_ROLES:
                return {**row, key: [*messages, {"role": "assistant", "content": ""}]}
    return row


def predict(
    model: Any,
    rows: PredictionRows,
    indices: Sequence[int],
    *,
    batch_size: int,
    options: dict[str, Any],
    synced: bool = False,
) -> Iterator[list[Line]]:
    """Answer rows batch by batch.

    Args:
        model: The model.
        rows: The rows.
        indices: Which of them to answer.
        batch_size: Rows answered at once.
        options: Generation options.
        synced: See ``generate.answer``.

    Yields:
        The lines of each batch: ``row``, ``id``, ``question``, ``answer``, ``prediction``, ``scores``, and ``edits``
        where an error rate is asked for (see ``metrics.corpus_scores``).
    """
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    # Where processes wait for each other in every step, none may leave a row out.
    read = rows.__getitem__ if synced else rows.question_or_none
    for batch in tqdm(batches, desc="answers", disable=None if processes.rank() == 0 else True):
        questions = [question for index in batch if (question := read(index))]
        if not questions:
            continue
        prompts = [question.prompt for question in questions]
        texts = answer(model, rows.processing, prompts, synced=synced, **options)
        form = rows.processing.generation.box_form
        yield [_line(question, text, form) for question, text in zip(questions, texts, strict=True)]


def _line(question: Question, prediction: str, box_form: str) -> Line:
    answer, names = question.answer, question.metrics
    line: Line = {
        "row": question.row,
        "id": question.row_id,
        "question": question.text,
        "answer": answer,
        "prediction": prediction,
        "scores": None,
    }
    if answer is not None:
        line["scores"] = score(prediction, answer, names) | box_scores(
            prediction, answer, names, form=box_form
        )
        if not ERROR_RATES.keys().isdisjoint(names):
            line["edits"] = count_edits(prediction, answer, names)
    return line


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
        self.path = path
        self.own = path if world == 1 else _beside(path, f".rank{rank}")
        self.settings_path = _beside(path, ".summary.json")  # and the scores, when the run has ended
        self.bad_rows_path = _beside(path, ".bad_rows.jsonl")  # the rows that can't be answered

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

    def _check(self, settings: Line) -> None:
        if not self.settings_path.is_file():
            raise PredictionFileError(
                f"--output {self.path}: the file exists, but {self.settings_path.name} does not, so nobody can tell "
                "which model wrote it. Name another file, or start over with --overwrite true."
            )
        known = json.loads(self.settings_path.read_text(encoding="utf-8"))["settings"]
        if name := next((name for name in settings if known.get(name) != settings[name]), None):
            raise PredictionFileError(
                f"--output {self.path}: the lines in it were written with {name} {known.get(name)!r}, but now it is "
                f"{settings[name]!r}. Name another file, or start over with --overwrite true."
            )

    def append(self, lines: Iterable[Line]) -> None:
        """Write lines, and wait until they are on the disk."""
        with self.writing(), self.own.open("a", encoding="utf-8", errors=_ESCAPED) as file:
            file.writelines(_dump(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> tuple[list[Line], dict[str, float]]:
        """Join the parts and keep the scores; one process does so after all have written.

        Returns:
            All lines, in the order of the rows, and the scores.
        """
        with self.writing():
            lines = self._join()
            scores = corpus_scores(lines)
            kept = json.loads(self.settings_path.read_text(encoding="utf-8"))
            _write_whole(self.settings_path, _dump(kept | {"rows": len(lines), "scores": scores}, indent=2))
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
    partial = _beside(path, ".partial")
    partial.write_text(text, encoding="utf-8", errors=_ESCAPED)
    partial.replace(path)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _dump(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)

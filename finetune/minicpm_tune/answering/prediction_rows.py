"""The rows of a data file as questions to a model, and the model's answers to them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from minicpm_tune import processes
from minicpm_tune.answering.generate import answer
from minicpm_tune.answering.metrics import score
from minicpm_tune.batch import Sample
from minicpm_tune.data.bad_rows import BadRow
from minicpm_tune.data.media.sources import check_source
from minicpm_tune.data.row_check import problems_text
from minicpm_tune.data.row_parsing import ParsedRow
from minicpm_tune.data.samples import TrainingRows
from minicpm_tune.data.turns import Turn, media_of
from minicpm_tune.errors import DataError, RowError

logger = logging.getLogger(__name__)

_USER_ROLES = ("user", "human")


@dataclass(frozen=True)
class Question:
    """One row as a question: everything in front of its last answer, and that answer.

    Attributes:
        row: Its number in the data.
        row_id: The row's ``id``, or None.
        text: The last question, as text.
        answer: The row's last answer; None for a row that ends with a question.
        prompt: What the model is given.
    """

    row: int
    row_id: Any
    text: str
    answer: str | None
    prompt: Sample


class PredictionRows:
    """The rows of a data set, as questions. Its ``--on_bad_row`` says what happens to rows that can't be answered.

    Args:
        rows: The data set.
        thinking: Whether the model is asked to think first.
        system_prompt: Put in front of rows without a system turn; empty for none.
    """

    def __init__(self, rows: TrainingRows, *, thinking: bool = False, system_prompt: str = "") -> None:
        self.rows = rows
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
            self.processing.check(row.turns)
            images = self.rows.image_options(index)
            for source in row.sources:
                if source.kind == "image":
                    check_source(source.value, images.folder, allow_remote=images.allow_remote)
        except RowError as error:
            return self.rows.describe(index, error)
        return None

    def _parse(self, index: int) -> ParsedRow:
        return self.processing.parse(_with_answer(self.rows.mixture.read(index)))

    def _question(self, index: int) -> Question:
        row = self._parse(index)
        *turns, last = row.turns
        if self.system_prompt and turns[0].role != "system":
            turns.insert(0, Turn("system", (self.system_prompt,)))
        sources = [row.sources[media.index] for media in media_of(turns)]
        pictures = self.rows.open_media(index, sources)
        prompt = self.processing.encode_prompt(turns, pictures, thinking=self.thinking)
        return Question(index, row.row_id, turns[-1].text.strip(), last.text or None, prompt)

    def picture(self, index: int) -> Image.Image | None:
        """The row's first picture, or first frame, in mode RGB; None for a row without."""
        sources = self._parse(index).sources
        for picture in self.rows.open_media(index, sources[:1]):
            return next(iter(picture.frames()))
        return None


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
) -> Iterator[list[dict[str, Any]]]:
    """Answer rows batch by batch.

    Args:
        model: The model.
        rows: The rows.
        indices: Which of them to answer.
        batch_size: Rows answered at once.
        options: Generation options.
        synced: See ``generate.answer``.

    Yields:
        The lines of each batch: ``row``, ``id``, ``question``, ``answer``, ``prediction``, ``scores``.
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
        yield [_line(question, text) for question, text in zip(questions, texts, strict=True)]


def _line(question: Question, prediction: str) -> dict[str, Any]:
    return {
        "row": question.row,
        "id": question.row_id,
        "question": question.text,
        "answer": question.answer,
        "prediction": prediction,
        "scores": None if question.answer is None else score(prediction, question.answer),
    }

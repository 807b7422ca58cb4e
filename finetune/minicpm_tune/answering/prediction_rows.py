"""The rows of a data file as questions to a model: everything in front of the last answer, and that "
"answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dataset import DataOptions, SupervisedDataset
from minicpm_tune.batch import Sample
from minicpm_tune.data.media.sources import check_source
from minicpm_tune.data.row_parsing import Conversation, parse_row
from minicpm_tune.data.samples import Processing
from minicpm_tune.data.turns import Turn
from minicpm_tune.errors import DataError, RowError

_USER_ROLES = ("user", "human")
SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Asked:
    """One row as a question.

    Attributes:
        index: Its number in the data.
        row_id: The row's ``id``, or None.
        question: The last question, as text.
        answer: The row's last answer; None for a row that ends with a question.
        sample: The prompt.
    """

    index: int
    row_id: Any
    question: str
    answer: str | None
    sample: Sample


class PredictionRows:
    """The rows of a data file, as questions.

    Args:
        data_path: What ``--data_path`` takes, see ``data/files/mixtures.py``.
        processing: The checkpoint's ``Processing``.
        options: Where images are and how they are opened.
        thinking: Whether the model is asked to think first.
        system_prompt: Put in front of rows without a system turn; empty for none.
    """

    def __init__(
        self,
        data_path: str,
        processing: Processing,
        options: DataOptions | None = None,
        *,
        thinking: bool = False,
        system_prompt: str = "",
    ) -> None:
        self.data = SupervisedDataset(data_path, processing, options or DataOptions(model_max_length=None))
        self.processing = processing
        self.thinking, self.system_prompt = thinking, system_prompt

    def __len__(self) -> int:
        return self.data.row_count

    def __getitem__(self, index: int) -> Asked:
        try:
            return self._asked(index)
        except RowError as error:
            raise DataError(str(self.data.describe(index, error))) from error

    def check(self, indices: Sequence[int]) -> None:
        """See that rows can be asked, before a model is loaded; images are looked for, not decoded.

        Raises:
            DataError: With the first twenty problems and their number.
        """
        problems = []
        for index in indices:
            try:
                conversation = self._conversation(index)
                self.processing.check(conversation.turns)
                images = self.data.sources[self.data.place(index)[0]].images
                for source in conversation.sources:
                    if source.kind == "image":
                        check_source(source.value, images.folder, allow_remote=images.allow_remote)
            except RowError as error:
                problems.append(str(self.data.describe(index, error)))
        if problems:
            shown = "\n".join(problems[:SHOWN_PROBLEMS])
            raise DataError(f"{len(problems)} of {len(indices)} rows can't be asked:\n{shown}")

    def _conversation(self, index: int) -> Conversation:
        source, row = self.data.place(index)
        image_end = self.processing.generation.image_end
        return parse_row(_with_answer(self.data.sources[source].rows[row]), image_end=image_end)

    def _asked(self, index: int) -> Asked:
        conversation = self._conversation(index)
        *turns, last = conversation.turns
        if self.system_prompt and turns[0].role != "system":
            turns.insert(0, Turn("system", (self.system_prompt,)))
        media = [part.index for turn in turns for part in turn.parts if not isinstance(part, str)]
        pictures = self.data.pictures(index, [conversation.sources[number] for number in media])
        sample = self.processing.encode_prompt(turns, pictures, thinking=self.thinking)
        return Asked(index, conversation.row_id, turns[-1].text.strip(), last.text or None, sample)

    def picture(self, index: int) -> Image.Image | None:
        """The row's first picture, or first frame, in mode RGB; None for a row without."""
        sources = self._conversation(index).sources
        for picture in self.data.pictures(index, sources[:1]):
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

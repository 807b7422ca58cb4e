"""The story of a row: file -> turns and media -> prompt -> tokens, labels, patches -> sample -> batch.

``SupervisedDataset`` tells it up to the sample, ``data_collator`` makes the batch. A row is used exactly as written,
or reported.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import copy
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from minicpm_tune.batch import Sample
from minicpm_tune.data.bad_rows import BadRow, BadRowLog
from minicpm_tune.data.files.row_files import Mixture
from minicpm_tune.data.media.audio import Clip, open_audio
from minicpm_tune.data.media.films import open_film
from minicpm_tune.data.media.images import ImageOptions, Picture, open_image
from minicpm_tune.data.media.videos import open_video
from minicpm_tune.data.row_parsing import ParsedRow, Source
from minicpm_tune.data.sample_tensors import Plan, data_collator
from minicpm_tune.data.samples import Processing
from minicpm_tune.errors import DataError, DroppedRowError, RowError

__all__ = ["SupervisedDataset", "data_collator"]

logger = logging.getLogger("minicpm_tune.dataset")

# Problems of files, which may arise after the check; all others can be seen before training.
_FILE_PROBLEMS = ("image", "video", "audio", "missing image", "missing video")


class SupervisedDataset(Dataset):
    """The rows of one or several data files as training samples.

    Rows are numbered through all files: ``dataset[i]`` is row i, ``mixture.epoch_order`` says which rows an epoch
    holds, and ``len(dataset)`` how many those are.

    Args:
        data_path: What ``--data_path`` takes, see ``settings/data_arguments.py``.
        processing: What the checkpoint's samples look like, and how the user wants rows to become samples.
        max_samples: The rows that are taken of each file at most; None: all.

    Raises:
        DataError: When a file can't be read.
    """

    def __init__(
        self, data_path: str | Path, processing: Processing, *, max_samples: int | None = None
    ) -> None:
        self.processing = processing
        arguments = processing.arguments
        self.mixture = Mixture(
            str(data_path), given_num=arguments.given_num, max_samples=max_samples, columns=arguments.columns
        )
        self.bad_rows = BadRowLog()
        self.left_out: set[int] = set()  # rows that contribute nothing
        self.lengths: np.ndarray | None = None  # tokens of every row, once the rows are checked

    def __len__(self) -> int:
        return self.mixture.samples

    def part(self, mixture: Mixture) -> SupervisedDataset:
        """The same data set with some of its rows, as ``Mixture.part`` gives them."""
        part = copy(self)
        part.mixture = mixture
        return part

    def __getitem__(self, index: int) -> Sample:
        """Make the sample of a row; a row that can't be used contributes nothing, or ends the run."""
        if index in self.left_out:
            return self.processing.padding_sample()
        try:
            plan = self.plan(index)
            sample = self.processing.finish(plan)
        except RowError as error:
            return self._without(index, error)
        return {**sample, "origin": self.mixture.origin(index)}

    def plan(self, index: int) -> Plan:
        """Everything of a row's sample but its pixels.

        Raises:
            RowError: When the row can't be used, as far as can be told without decoding images.
        """
        row = self.parse(index)
        pictures = self.open_media(index, row.sources)
        return self.processing.plan(row.turns, pictures)

    def parse(self, index: int) -> ParsedRow:
        """Read a row's turns, and where its media come from.

        Raises:
            RowError: When it is in no accepted form.
        """
        return self.processing.parse(self.mixture.read(index))

    def open_media(self, index: int, sources: Sequence[Source]) -> list[Picture | Clip]:
        """Open a row's images, videos and audio; they are decoded later.

        Raises:
            RowError: When one can't be opened.
        """
        options = self.image_options(index)
        return [self._open(source, options) for source in sources]

    def _open(self, source: Source, options: ImageOptions) -> Picture | Clip:
        if source.kind == "image":
            return open_image(source.value, options)
        if source.kind == "audio":
            return open_audio(source.value, options.folder, allow_remote=options.allow_remote)
        video, film = self.processing.media.video, self.processing.media.film
        if video is None:
            raise RowError("video", self.processing.no_video)
        if source.sound and film is not None:
            return open_film(source.value, options, film.for_one(source.fps, source.max_frames))
        return open_video(source.value, options, video.for_one(source.fps, source.max_frames))

    def image_options(self, index: int) -> ImageOptions:
        """How a row's images are found and opened."""
        source, _ = self.mixture.origin(index)
        folder = self.mixture.files[source].rows.path.parent
        return ImageOptions.of(self.processing.arguments, self.processing.generation, folder=folder)

    # --- rows that can't be used ---

    def describe(self, index: int, error: RowError) -> BadRow:
        """A bad row with its place."""
        return BadRow.of(self.mixture, index, error)

    def _without(self, index: int, error: RowError) -> Sample:
        """A sample that contributes nothing, where the options let a bad row pass; ranks stay in step."""
        bad = self.describe(index, error)
        skipped = (
            self.processing.arguments.on_bad_row == "skip"
            or isinstance(error, DroppedRowError)
            or error.kind in _FILE_PROBLEMS
        )
        if not skipped:
            raise DataError(f"{bad}\n(--on_bad_row skip leaves such rows out.)") from error
        logger.warning("left out: %s", bad)
        self.bad_rows.add(bad)
        return self.processing.padding_sample()

"""Rows -> samples: ``SupervisedDataset``. A row is used exactly as written, or reported.

Shapes as in ``data/samples.py``; batches are made in ``data/collating.py``.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from minicpm_tune.batch import IGNORE_INDEX, Sample
from minicpm_tune.data.bad_rows import BadRow, BadRowLog
from minicpm_tune.data.collating import data_collator
from minicpm_tune.data.files.json_rows import Rows, open_rows
from minicpm_tune.data.files.mixtures import epoch_order, read_data_path
from minicpm_tune.data.media.images import DEFAULT_MAX_PIXELS, ImageOptions, Picture, open_image
from minicpm_tune.data.media.videos import open_video
from minicpm_tune.data.row_parsing import Conversation, Source, parse_row
from minicpm_tune.data.samples import OVERLENGTH, Plan, Processing
from minicpm_tune.errors import DataError, DroppedRowError, RowError

__all__ = ["DataOptions", "SupervisedDataset", "data_collator", "padding_sample"]

logger = logging.getLogger("minicpm_tune.dataset")

EXIF_ORIENTATION = ("auto", "apply", "ignore")
ON_BAD_ROW = ("error", "skip")
CHECK_IMAGES = ("auto", "header", "full")
# Problems of files, which may arise after the check; all others can be seen before training.
_FILE_PROBLEMS = ("image", "video", "missing image", "missing video")


@dataclass(frozen=True)
class DataOptions:
    """How rows become samples; the names are those of the command line.

    Attributes:
        model_max_length: Longest sequence, in tokens, image placeholders included; ``None`` for no limit.
        overlength: What happens to longer rows, one of ``OVERLENGTH``.
        on_bad_row: ``error`` stops at a bad row, ``skip`` leaves it out; images that become unreadable
            while training are left out either way.
        check_images: How the check before training looks at images: ``header``, ``full`` (decoded), or
            ``auto``: decoded when there are few rows.
        image_folder: What relative paths are relative to; ``None`` means the data file's folder.
        given_num: Whether the amounts in the data path count; else every row stands once.
        allow_remote_images: Whether http(s) images are fetched.
        max_image_pixels: Most pixels an image may have; 0 for no limit.
        exif_orientation: ``auto`` as the generation's inference does, ``apply`` or ``ignore``.
    """

    model_max_length: int | None = 2048
    overlength: str = "truncate"
    on_bad_row: str = "error"
    check_images: str = "auto"
    image_folder: str | None = None
    given_num: bool = True
    allow_remote_images: bool = False
    max_image_pixels: int = DEFAULT_MAX_PIXELS
    exif_orientation: str = "auto"

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("overlength", self.overlength, OVERLENGTH),
            ("on_bad_row", self.on_bad_row, ON_BAD_ROW),
            ("check_images", self.check_images, CHECK_IMAGES),
            ("exif_orientation", self.exif_orientation, EXIF_ORIENTATION),
        ):
            if value not in choices:
                raise DataError(
                    f"--{name}: found {value!r}, expected one of {', '.join(choices)}. Choose one."
                )


@dataclass(frozen=True)
class _DataSource:
    """A data file of the mixture, with how its images are opened."""

    rows: Rows
    samples: int
    images: ImageOptions = field(repr=False)


class SupervisedDataset(Dataset):
    """The rows of one or several data files as training samples.

    Rows are numbered through all files: ``dataset[i]`` is row i, ``epoch_order`` says which rows an epoch
    holds, and ``len(dataset)`` how many those are.

    Args:
        data_path: What ``--data_path`` takes, see ``data/files/mixtures.py``.
        processing: The checkpoint's ``Processing``.
        options: Limits, and what happens to rows that can't be used.

    Raises:
        DataError: When a file can't be read.
    """

    def __init__(
        self, data_path: str | Path, processing: Processing, options: DataOptions | None = None
    ) -> None:
        self.processing = processing
        self.options = options or DataOptions()
        self.sources: list[_DataSource] = []
        for source in read_data_path(str(data_path)):
            rows = open_rows(source.path)
            samples = source.samples(len(rows)) if self.options.given_num else len(rows)
            if not samples:
                raise DataError(
                    f"--data_path {source.path}: its share of {len(rows)} rows is none, expected at least "
                    "one. Raise "
                    "its weight, or remove it."
                )
            self.sources.append(_DataSource(rows, samples, self._image_options(rows)))
        self._ends = list(accumulate(len(source.rows) for source in self.sources))
        self.bad_rows = BadRowLog()
        self._left_out: set[int] = set()
        self._lengths: np.ndarray | None = None

    def _image_options(self, rows: Rows) -> ImageOptions:
        options = self.options
        upright = options.exif_orientation == "apply" or (
            options.exif_orientation == "auto" and self.processing.generation.upright_images
        )
        return ImageOptions(
            folder=Path(options.image_folder).expanduser() if options.image_folder else rows.path.parent,
            upright=upright,
            allow_remote=options.allow_remote_images,
            max_pixels=options.max_image_pixels or None,
        )

    def __len__(self) -> int:
        return sum(source.samples for source in self.sources)

    @property
    def row_count(self) -> int:
        """Number of rows in all files; an epoch may hold more or fewer samples."""
        return self._ends[-1]

    @property
    def source_names(self) -> list[str]:
        """The data files, by the source number that samples carry."""
        return [str(source.rows.path) for source in self.sources]

    def epoch_order(self, *, seed: int, epoch: int, shuffle: bool = True) -> list[int]:
        """The rows of one epoch, the same on every rank; see ``mixtures.epoch_order``."""
        sizes = [len(source.rows) for source in self.sources]
        counts = [source.samples for source in self.sources]
        return epoch_order(sizes, counts, seed=seed, epoch=epoch, shuffle=shuffle).tolist()

    def __getitem__(self, index: int) -> Sample:
        if index in self._left_out:
            return padding_sample(self.processing)
        try:
            conversation = self.conversation(index)
            pictures = self.pictures(index, conversation.sources)
            sample = self.processing.encode(
                conversation.turns,
                pictures,
                limit=self.options.model_max_length,
                overlength=self.options.overlength,
            )
        except RowError as error:
            return self._without(index, error)
        return {**sample, "origin": self.place(index)}

    def _without(self, index: int, error: RowError) -> Sample:
        """A sample that contributes nothing, where the options let a bad row pass; ranks stay in step."""
        bad = self.describe(index, error)
        skipped = (
            self.options.on_bad_row == "skip"
            or isinstance(error, DroppedRowError)
            or error.kind in _FILE_PROBLEMS
        )
        if not skipped:
            raise DataError(f"{bad}\n(--on_bad_row skip leaves such rows out.)") from error
        logger.warning("left out: %s", bad)
        self.bad_rows.add(bad)
        return padding_sample(self.processing)

    def place(self, index: int) -> tuple[int, int]:
        """The source and the row in its file that a row number means."""
        source = bisect_right(self._ends, index)
        return source, index - self.first_row(source)

    def first_row(self, source: int) -> int:
        """The number that a source's first row has through all files."""
        return self._ends[source - 1] if source else 0

    def conversation(self, index: int) -> Conversation:
        """Read a row.

        Raises:
            RowError: When it is in no accepted form.
        """
        source, row = self.place(index)
        return parse_row(self.sources[source].rows[row], image_end=self.processing.generation.image_end)

    def pictures(self, index: int, sources: Sequence[Source]) -> list[Picture]:
        """Open a row's images and videos; decoding comes later.

        Raises:
            RowError: When one can't be opened.
        """
        images = self.sources[self.place(index)[0]].images
        return [self._picture(source, images) for source in sources]

    def _picture(self, source: Source, images: ImageOptions) -> Picture:
        if source.kind == "image":
            return open_image(source.value, images)
        video = self.processing.video
        if video is None:
            raise RowError(
                "video",
                f"the row has a video, expected images: {self.processing.generation.title} was not trained "
                "on video. "
                "Remove the row, or give single frames as images.",
            )
        return open_video(source.value, images, video)

    def plan(self, index: int) -> Plan:
        """Everything of a row's sample but its pixels.

        Raises:
            RowError: When the row can't be used, as far as can be told without decoding images.
        """
        conversation = self.conversation(index)
        return self.processing.plan(
            conversation.turns,
            self.pictures(index, conversation.sources),
            limit=self.options.model_max_length,
            overlength=self.options.overlength,
        )

    def describe(self, index: int, error: RowError) -> BadRow:
        """A bad row with its place."""
        source, row = self.place(index)
        rows = self.sources[source].rows
        try:
            value: Any = rows[row]
        except RowError:
            value = None
        row_id = value.get("id") if isinstance(value, dict) else None
        return BadRow(str(rows.path), row, row_id, error.kind, str(error))

    def leave_out(self, index: int) -> None:
        """Have a row contribute nothing from now on."""
        self._left_out.add(index)

    def check_rows(self) -> None:
        """See that every row can be used, before a model is loaded; see ``data_check.check_rows``.

        Raises:
            DataError: With the first twenty problems and their number, unless ``on_bad_row`` is ``skip``.
        """
        from minicpm_tune.data.row_check import check_rows  # it reads this module

        self._lengths = check_rows(self)

    def lengths(self) -> np.ndarray:
        """Every row's length in tokens, by row number; found by the check of the rows."""
        if self._lengths is None:
            self.check_rows()
        assert self._lengths is not None
        return self._lengths


def padding_sample(processing: Processing) -> Sample:
    """A sample that contributes nothing: one token, not supervised, no image."""
    ids = torch.tensor([processing.tokenizer.convert_tokens_to_ids(processing.generation.turn_end)])
    sample: Sample = {
        "input_ids": ids,
        "labels": torch.full_like(ids, IGNORE_INDEX),
        "pixel_values": torch.zeros((3, processing.rules.patch_size, 0), dtype=torch.uint8),
        "tgt_sizes": torch.zeros((0, 2), dtype=torch.int32),
        "image_bound": torch.zeros((0, 2), dtype=torch.int64),
        "origin": None,
    }
    if processing.generation.token_types:
        sample["mm_token_type_ids"] = torch.zeros_like(ids)
    return sample

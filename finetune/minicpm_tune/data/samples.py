"""Turns and media -> a sample, step by step: ``Processing`` holds what one checkpoint needs for it.

pieces -> layouts -> placeholders -> tokens and labels -> truncate -> tensors
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from minicpm_tune.batch import IGNORE_INDEX, Sample
from minicpm_tune.checkpoints.model_folder import read_generation
from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.checkpoints.vocabulary import add_tokens, check_vocabulary, load_tokenizer
from minicpm_tune.data.bad_rows import BadRow, BadRowLog
from minicpm_tune.data.files.row_files import Mixture
from minicpm_tune.data.grounding import PixelBox, boxes_in_pixels, write_objects
from minicpm_tune.data.media.audio import Clip
from minicpm_tune.data.media.images import ImageOptions, Picture
from minicpm_tune.data.media_rules import MediaRules, read_media_rules
from minicpm_tune.data.objects import Size
from minicpm_tune.data.placeholders import PlaceholderStyle, write_placeholders
from minicpm_tune.data.prompts import Piece, PromptWriter
from minicpm_tune.data.row_parsing import ParsedRow, parse_row
from minicpm_tune.data.sample_tensors import Plan, sample_tensors
from minicpm_tune.data.slicing.layouts import ImageLayout, SlicingRules
from minicpm_tune.data.token_labels import Encoded, encode_pieces, truncate
from minicpm_tune.data.turns import Source, Turn, media_of
from minicpm_tune.data.vision_cache import VisionCache
from minicpm_tune.errors import OVER_LONG, DroppedRowError, RowError, check_unicode
from minicpm_tune.settings.data_arguments import DataArguments

Pictures = Sequence[Picture | Clip | Image.Image]  # by ``Media.index``; decoded images in mode RGB


class TrainingRows(Protocol):
    """What checks, plans and reports need of a data set; ``SupervisedDataset`` is one."""

    processing: Processing
    mixture: Mixture
    bad_rows: BadRowLog
    left_out: set[int]
    lengths: np.ndarray | None

    def __len__(self) -> int:
        """Samples in an epoch."""

    def __getitem__(self, index: int) -> Sample:
        """Make the sample of a row."""

    def parse(self, index: int) -> ParsedRow:
        """Read a row's turns, and where its media come from."""

    def open_media(self, index: int, sources: Sequence[Source]) -> list[Picture | Clip]:
        """Open a row's images and videos; they are decoded later."""

    def image_options(self, index: int) -> ImageOptions:
        """How a row's images are found and opened."""

    def plan(self, index: int) -> Plan:
        """Everything of a row's sample but its pixels; ``RowError`` when the row can't be used."""

    def describe(self, index: int, error: RowError) -> BadRow:
        """A bad row with its place."""


@dataclass(frozen=True)
class Processing:
    """What turns conversations of one checkpoint into samples.

    Attributes:
        generation: The checkpoint's generation.
        tokenizer: Its tokenizer.
        writer: How conversations are written.
        media: How images and videos are cut and written.
        arguments: How the user wants rows to become samples.
        vision_cache: Where the vision tower's features of training samples are stored; None: nowhere.
        new_tokens: Token -> id of those that were added to the checkpoint's.
    """

    generation: Generation
    tokenizer: PreTrainedTokenizerFast
    writer: PromptWriter
    media: MediaRules
    arguments: DataArguments
    vision_cache: VisionCache | None = None
    new_tokens: dict[str, int] = field(default_factory=dict)

    @property
    def rules(self) -> SlicingRules:
        """How images are cut."""
        return self.media.slicing

    @property
    def style(self) -> PlaceholderStyle:
        """How images are written into the prompt."""
        return self.media.style

    def with_media(self, **changes: Any) -> Processing:
        """The same with other ``MediaRules``, such as another limit of slices."""
        return replace(self, media=replace(self.media, **changes))

    def parse(self, row: Any) -> ParsedRow:
        """Read a row's turns, and where its media come from.

        Raises:
            RowError: When it is in no accepted form.
        """
        try:
            return parse_row(
                row,
                image_end=self.generation.image_end,
                literal_control_tokens=self.arguments.literal_control_tokens,
                model=self.generation.title,
                hears=self.media.audio is not None,
                video_sound=self.arguments.video_sound,
            )
        except RecursionError as error:  # a value that no message can show
            raise RowError(
                "form", "a value in the row is nested too deeply, expected a text. Remove it."
            ) from error

    # --- training samples ---

    def encode(self, turns: Sequence[Turn], pictures: Pictures) -> Sample:
        """Turn a conversation with its last answer into a training sample.

        Args:
            turns: The conversation; media are numbered in the order of the text.
            pictures: Its pictures.

        Returns:
            The sample, at most ``--model_max_length`` tokens long.

        Raises:
            RowError: When the conversation can't be used.
        """
        return self.finish(self.plan(turns, pictures))

    def plan(self, turns: Sequence[Turn], pictures: Pictures) -> Plan:
        """Decide everything of a training sample but its pixels; arguments and errors as of ``encode``."""
        return self.fit(self.whole_plan(turns, pictures))

    def whole_plan(self, turns: Sequence[Turn], pictures: Pictures) -> Plan:
        """The plan before ``--model_max_length`` is applied."""
        turns, opened = self._ready(turns, pictures)
        return self._tokenize(self.writer.training_pieces(turns), opened, self.rules)

    def fit(self, plan: Plan) -> Plan:
        """Make a whole plan fit ``--model_max_length``, and see that something is left to learn."""
        plan = self._shorten(plan)
        if plan.encoded.supervised:
            return plan
        limit, found = self.arguments.model_max_length, f"none of the {len(plan.encoded.input_ids)} tokens"
        if limit is None:
            advice = "is supervised, expected an answer to learn. Add one, or remove it."
        else:
            advice = (
                f"that --model_max_length {limit} leaves is supervised, expected an answer to learn. Raise "
                "--model_max_length, cut images into fewer slices with --overlength shrink_slices, or remove the row."
            )
        raise RowError("nothing to learn", f"{found} {advice}")

    def finish(self, plan: Plan) -> Sample:
        """Decode a plan's pictures, and give the training sample."""
        sample = self._tensors(plan, self.vision_cache)
        sample["labels"] = torch.tensor(plan.encoded.labels, dtype=torch.int64)
        if plan.encoded.weights is not None:
            sample["loss_weights"] = torch.tensor(plan.encoded.weights, dtype=torch.float32)
        return sample

    def padding_sample(self) -> Sample:
        """A sample that contributes nothing: one token, not supervised, no image."""
        turn_end = self.tokenizer.convert_tokens_to_ids(self.generation.turn_end)
        assert isinstance(turn_end, int), turn_end
        nothing = Plan((), Encoded([turn_end], [IGNORE_INDEX]), (), ())
        return {**replace(self, vision_cache=None).finish(nothing), "origin": None}

    # --- prompts for generation ---

    def encode_prompt(
        self, turns: Sequence[Turn], pictures: Pictures, *, thinking: bool | None = None
    ) -> Sample:
        """Turn a conversation into what inference gives the model to answer.

        Args:
            turns: The conversation so far; its last turn is the user's.
            pictures: Its pictures.
            thinking: Whether the model is asked to think first (4.5 and later); None: as training asks, and
                by default as the model does by itself.

        Returns:
            A sample without labels.

        Raises:
            RowError: When the conversation can't be used, or the generation can't think.
        """
        turns, opened = self._ready(turns, pictures)
        if thinking and not self.generation.thinking:
            raise RowError(
                "thinking",
                f"enable_thinking is true, but {self.generation.title} has no thinking mode. Leave it out.",
            )
        pieces = self.writer.generation_pieces(turns, thinking=thinking)
        return self._tensors(self._tokenize(pieces, opened, self.rules))

    # --- the steps ---

    def _ready(
        self, turns: Sequence[Turn], pictures: Pictures
    ) -> tuple[list[Turn], tuple[Picture | Clip, ...]]:
        """Checked turns with their boxes written, and opened pictures."""
        opened = tuple(Picture.of(each) if isinstance(each, Image.Image) else each for each in pictures)
        written = self.with_boxes_written(turns, opened)
        self.check(written)
        return written, opened

    def with_boxes_written(self, turns: Sequence[Turn], pictures: Sequence[Picture | Clip]) -> list[Turn]:
        """The names and boxes of a row's ``objects`` as text.

        Raises:
            RowError: When a box does not fit its picture.
        """
        return write_objects(turns, _image_sizes(pictures), self.generation.box_form)

    def boxes(self, turns: Sequence[Turn], pictures: Sequence[Picture | Clip]) -> list[list[PixelBox]]:
        """For every picture the boxes that the conversation has of it: (label, x1, y1, x2, y2) in pixels."""
        return boxes_in_pixels(turns, _image_sizes(pictures), self.generation.box_form)

    def check(self, turns: Sequence[Turn]) -> None:
        """See that every text and medium can be given to this checkpoint.

        Raises:
            RowError: When one can't.
        """
        for number, turn in enumerate(turns):
            self._check_text(turn, number)
        media = media_of(turns)
        if self.media.video is None and any(each.kind == "video" for each in media):
            raise RowError("video", self.no_video)
        if self.media.audio is None and any(each.heard for each in media):
            title = self.generation.title
            raise RowError("audio", f"the row has audio, but {title} takes no audio here. Remove the row.")

    def _check_text(self, turn: Turn, number: int) -> None:
        plain = "".join(part for part in turn.parts if isinstance(part, str)) + (turn.thoughts or "")
        token = None if turn.literal else self.writer.find_control_token(plain)
        if token:
            raise RowError(
                "control token",
                f"turn {number} contains {token!r}, which the model reads as structure, expected text. Remove it; if "
                "it is meant as text, put a backslash in front of it, or set "
                '"literal_control_tokens": true in the row.',
            )
        if turn.thoughts is not None and not self.generation.thinking:
            raise RowError(
                "thoughts",
                f"turn {number} has thoughts under a key of their own, but {self.generation.title} has no thinking "
                "mode. Remove the key, or write the thoughts into the answer.",
            )
        check_unicode(turn.text + (turn.thoughts or ""), f"turn {number}")

    @property
    def no_video(self) -> str:
        """What is said of a row with a video, for a generation without."""
        return (
            f"the row has a video, expected images: {self.generation.title} was not trained on video. Remove the row, "
            "or give single frames as images."
        )

    def _tokenize(
        self, pieces: Sequence[Piece], pictures: tuple[Picture | Clip, ...], rules: SlicingRules
    ) -> Plan:
        """Pieces of the prompt and opened pictures -> layouts -> placeholders -> tokens."""
        assert sum(piece.media is not None for piece in pieces) == len(pictures), (pieces, len(pictures))
        layouts = tuple(self._layout(picture, rules) for picture in pictures)
        placeholders = write_placeholders(
            pictures, layouts, self.style, generation=self.generation, audio=self.media.audio
        )
        return Plan(pieces, encode_pieces(pieces, placeholders, self.tokenizer), pictures, layouts)

    def _layout(self, picture: Picture | Clip, rules: SlicingRules) -> tuple[ImageLayout, ...]:
        if isinstance(picture, Clip):
            return ()
        if picture.kind == "video":
            assert self.media.video is not None
            most = 1 if picture.sound else self.media.video.max_slice_nums
            rules = rules.limited(min(rules.max_slice_nums, most))
        return tuple(rules.layout(width, height) for width, height in picture.sizes)

    def _shorten(self, plan: Plan) -> Plan:
        """Bring a plan over ``--model_max_length`` to it, in the way that ``--overlength`` says."""
        limit, how = self.arguments.model_max_length, self.arguments.overlength
        length = len(plan.encoded.input_ids)
        if limit is None or length <= limit:
            return plan
        if how in ("drop", "error"):
            raise (DroppedRowError if how == "drop" else RowError)(
                OVER_LONG,
                f"the row is {length} tokens long, expected at most --model_max_length {limit}. Shorten it, raise the "
                "limit, or let --overlength shrink_slices cut its images into fewer slices.",
            )
        if how == "shrink_slices":
            for slices in range(self.rules.max_slice_nums - 1, 0, -1):
                plan = self._tokenize(plan.pieces, plan.pictures, self.rules.limited(slices))
                if len(plan.encoded.input_ids) <= limit:
                    return plan
        return replace(plan, encoded=truncate(plan.encoded, limit))

    def _tensors(self, plan: Plan, cache: VisionCache | None = None) -> Sample:
        return sample_tensors(
            plan, generation=self.generation, tokenizer=self.tokenizer, media=self.media, cache=cache
        )


def load_processing(
    folder: str | Path, arguments: DataArguments | None = None, *, new_tokens: Iterable[str] = ()
) -> Processing:
    """Read from a model folder what the data side needs.

    Args:
        folder: The model folder.
        arguments: How the user wants rows to become samples; by default as the checkpoint's inference does.
        new_tokens: Tokens to add to those of the checkpoint.

    Returns:
        The checkpoint's ``Processing``.

    Raises:
        VocabularyError: When tokenizer, embeddings and configuration contradict each other.
    """
    arguments = arguments or DataArguments.of_checkpoint()
    generation = read_generation(folder)
    tokenizer = load_tokenizer(folder, generation)
    check_vocabulary(Path(folder), tokenizer, generation)
    added = add_tokens(tokenizer, new_tokens)
    return Processing(
        generation,
        tokenizer,
        PromptWriter(tokenizer, generation, arguments),
        read_media_rules(Path(folder), generation, arguments),
        arguments,
        new_tokens=added,
    )


def _image_sizes(pictures: Sequence[Picture | Clip]) -> list[Size | None]:
    """(width, height) of every image; None for a video and for audio."""
    return [
        each.sizes[0] if isinstance(each, Picture) and each.kind == "image" else None for each in pictures
    ]

"""Everything the data side knows of one checkpoint: ``Processing`` turns conversations into samples.

Shapes: T is a sample's length in tokens, S its slices, P the runs of pad tokens that stand for them (a pack
of video frames shares one), L a slice's patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from minicpm_tune.batch import Sample
from minicpm_tune.checkpoints.model_folder import load_tokenizer, read_config, read_generation
from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.data.media.images import Picture
from minicpm_tune.data.media.videos import VideoRules, video_rules
from minicpm_tune.data.placeholders import Placeholder, PlaceholderStyle, image_placeholder, video_placeholder
from minicpm_tune.data.prompts import Piece, PromptOptions, PromptWriter
from minicpm_tune.data.slicing.adaptive import Layout, Rules, cut_into_patches, patch_columns
from minicpm_tune.data.slicing.image_rules import RequestedImageRules, read_rules
from minicpm_tune.data.token_labels import Encoded, encode_pieces, truncate
from minicpm_tune.data.turns import Turn, media_of
from minicpm_tune.data.vision_cache import VisionCache
from minicpm_tune.errors import OVER_LONG, DroppedRowError, RowError

OVERLENGTH = ("truncate", "drop", "error", "shrink_slices")


@dataclass(frozen=True)
class Plan:
    """A conversation as tokens, with the layout of every frame of its pictures; no pixel is decoded yet."""

    encoded: Encoded
    pictures: tuple[Picture, ...]
    layouts: tuple[tuple[Layout, ...], ...]


@dataclass(frozen=True)
class Processing:
    """What turns conversations of one checkpoint into samples.

    Attributes:
        generation: The checkpoint's generation.
        tokenizer: Its tokenizer.
        rules: How images are cut.
        style: How images are written into the prompt.
        writer: How conversations are written.
        video: How videos are sampled; ``None`` for generations without video.
        downsample_mode: ``16x`` or ``4x`` for 4.6 and 4.7 (what the model's forward must be told), else
            ``None``.
        vision_cache: Where the vision tower's features of training samples are kept; ``None``: they are not.
    """

    generation: Generation
    tokenizer: PreTrainedTokenizerFast
    rules: Rules
    style: PlaceholderStyle
    writer: PromptWriter
    video: VideoRules | None = None
    downsample_mode: str | None = None
    vision_cache: VisionCache | None = None

    def encode(
        self,
        turns: Sequence[Turn],
        pictures: Sequence[Picture | Image.Image],
        *,
        limit: int | None = None,
        overlength: str = "truncate",
    ) -> Sample:
        """Turn a conversation with its last answer into a training sample.

        Args:
            turns: The conversation; media are numbered in the order of the text.
            pictures: Its pictures, or decoded images in mode RGB, by ``Media.index``.
            limit: Longest sequence, in tokens.
            overlength: What happens to a longer one: ``truncate`` cuts it, never inside an image;
                ``shrink_slices`` first uses fewer slices per image; ``drop`` and ``error`` raise.

        Returns:
            The sample: ``input_ids`` [T], ``labels`` [T], ``pixel_values`` uint8 [3, 14, 14 * sum(L)],
            ``tgt_sizes`` [S, 2], ``image_bound`` [P, 2]; for 4.7 ``mm_token_type_ids`` [T]; with packed
            video frames ``temporal_ids`` [S, 2].

        Raises:
            RowError: When the conversation can't be used.
        """
        return self.finish(self.plan(turns, pictures, limit=limit, overlength=overlength))

    def encode_prompt(
        self, turns: Sequence[Turn], pictures: Sequence[Picture | Image.Image], *, thinking: bool = False
    ) -> Sample:
        """Turn a conversation into what inference gives the model to answer.

        Args:
            turns: The conversation so far; its last turn is the user's.
            pictures: Its pictures, or decoded images in mode RGB, by ``Media.index``.
            thinking: Whether the model is asked to think first (4.5 and later).

        Returns:
            A sample as of ``encode``, without labels.

        Raises:
            RowError: When the conversation can't be used, or the generation can't think.
        """
        self.check(turns)
        if thinking and not self.generation.thinking:
            raise RowError(
                "thinking",
                f"enable_thinking is true, but {self.generation.title} has no thinking mode. Leave it out.",
            )
        pieces = self.writer.generation_pieces(turns, thinking=thinking)
        return self._sample(self._planned(pieces, turns, _as_pictures(pictures), self.rules))

    def check(self, turns: Sequence[Turn]) -> None:
        """See that every text and medium can be given to this checkpoint.

        Raises:
            RowError: When one can't.
        """
        for number, turn in enumerate(turns):
            token = self.writer.find_control_token(turn.text)
            if token:
                raise RowError(
                    "control token",
                    f"turn {number} contains {token!r}, which the model reads as structure, expected text. "
                    "Remove it, or write it in another way.",
                )
        if self.video is None and any(media.kind == "video" for media in media_of(turns)):
            raise RowError(
                "video",
                f"the row has a video, expected images: {self.generation.title} was not trained on video. "
                "Remove "
                "the row, or give single frames as images.",
            )

    def plan(
        self,
        turns: Sequence[Turn],
        pictures: Sequence[Picture | Image.Image],
        *,
        limit: int | None = None,
        overlength: str = "truncate",
    ) -> Plan:
        """Decide everything of a training sample but its pixels; arguments and errors as of ``encode``."""
        self.check(turns)
        pieces = self.writer.training_pieces(turns)
        opened = _as_pictures(pictures)
        plan = self._planned(pieces, turns, opened, self.rules)
        if limit is not None and len(plan.encoded.input_ids) > limit:
            plan = self._fitted(plan, pieces, turns, limit=limit, overlength=overlength)
        if not plan.encoded.supervised:
            raise RowError(
                "nothing to learn",
                f"none of the {len(plan.encoded.input_ids)} tokens"
                + (f" that --model_max_length {limit} leaves" if limit else "")
                + " is supervised, expected an answer to learn. Shorten the row, raise --model_max_length, "
                "or remove it.",
            )
        return plan

    def finish(self, plan: Plan) -> Sample:
        """Decode a plan's pictures, and give the training sample; see ``encode``.

        With a ``vision_cache`` the sample has ``pictures`` (``batch.PictureFeatures``), and ``pixel_values`` of those
        alone whose features are not kept yet; only they are decoded.
        """
        labels = torch.tensor(plan.encoded.labels, dtype=torch.int64)
        return {**self._sample(plan, cache=self.vision_cache), "labels": labels}

    def _fitted(
        self, plan: Plan, pieces: Sequence[Piece], turns: Sequence[Turn], *, limit: int, overlength: str
    ) -> Plan:
        length = len(plan.encoded.input_ids)
        if overlength in ("drop", "error"):
            error = DroppedRowError if overlength == "drop" else RowError
            raise error(
                OVER_LONG,
                f"the row is {length} tokens long, expected at most --model_max_length {limit}. Shorten it, "
                "raise the "
                "limit, or choose another --overlength.",
            )
        if overlength == "shrink_slices":
            for slices in range(self.rules.max_slice_nums - 1, 0, -1):
                smaller = self._planned(pieces, turns, plan.pictures, self.rules.limited(slices))
                if len(smaller.encoded.input_ids) <= limit:
                    return smaller
            plan = self._planned(pieces, turns, plan.pictures, self.rules.limited(1))
        return replace(plan, encoded=truncate(plan.encoded, limit))

    def _planned(
        self, pieces: Sequence[Piece], turns: Sequence[Turn], pictures: tuple[Picture, ...], rules: Rules
    ) -> Plan:
        layouts = tuple(self._layouts(picture, rules) for picture in pictures)
        encoded = encode_pieces(pieces, self._placeholders(pictures, layouts), self.tokenizer)
        assert len(media_of(turns)) == len(pictures), (len(media_of(turns)), len(pictures))
        return Plan(encoded, pictures, layouts)

    def _layouts(self, picture: Picture, rules: Rules) -> tuple[Layout, ...]:
        if picture.kind == "video":
            assert self.video is not None
            rules = rules.limited(min(rules.max_slice_nums, self.video.max_slice_nums))
        return tuple(rules.layout(width, height) for width, height in picture.sizes)

    def _placeholders(
        self, pictures: Sequence[Picture], layouts: Sequence[tuple[Layout, ...]]
    ) -> list[Placeholder]:
        # Inference with a video runs without image ids up to 4.5 (released README files).
        has_video = any(picture.kind == "video" for picture in pictures)
        numbered = self.style.image_ids and (self.generation.image_ids_beside_video or not has_video)
        counts = {"image": 0, "video": 0}
        placeholders = []
        for picture, frames in zip(pictures, layouts, strict=True):
            number = counts[picture.kind]
            counts[picture.kind] += 1
            if picture.kind == "image":
                placeholders.append(
                    image_placeholder(frames[0], self.style, number=number if numbered else None)
                )
                continue
            shown = [frames[index] for index in picture.pack_starts]
            placeholders.append(
                video_placeholder(shown, self.style, number=number if self.style.video_ids else None)
            )
        return placeholders

    def _sample(self, plan: Plan, *, cache: VisionCache | None = None) -> Sample:
        encoded = plan.encoded
        kept = len(encoded.media_spans)
        pictures, layouts = plan.pictures[:kept], plan.layouts[:kept]
        known = [None] * kept if cache is None else cache.pictures(pictures, layouts)
        unknown = [index for index, found in enumerate(known) if found is None or found.features is None]
        input_ids = torch.tensor(encoded.input_ids, dtype=torch.int64)
        sizes = [size for frames in layouts for layout in frames for size in layout.tgt_sizes]
        sample: Sample = {
            "input_ids": input_ids,
            "pixel_values": patches_of(
                [pictures[index] for index in unknown],
                [layouts[index] for index in unknown],
                self.rules.patch_size,
            ),
            "tgt_sizes": torch.tensor(sizes, dtype=torch.int32).reshape(-1, 2),
            "image_bound": torch.tensor(encoded.image_bound, dtype=torch.int64).reshape(-1, 2),
        }
        if self.generation.token_types:
            sample["mm_token_type_ids"] = token_types(input_ids, self.tokenizer, self.style)
        if cache is not None:
            sample["pictures"] = [found for found in known if found is not None]
        if any(picture.packs for picture in pictures):
            sample["temporal_ids"] = temporal_ids(pictures, layouts)
        return sample


def _as_pictures(pictures: Sequence[Picture | Image.Image]) -> tuple[Picture, ...]:
    return tuple(picture if isinstance(picture, Picture) else Picture.of(picture) for picture in pictures)


def load_processing(
    folder: str | Path,
    *,
    max_slice_nums: int | None = None,
    enable_thinking: str = "auto",
    train_on: str = "all_turns",
    downsample_mode: str | None = None,
    video_fps: float | None = None,
    max_num_frames: int | None = None,
    img_size: int | None = None,
    hd_num: int | None = None,
) -> Processing:
    """Read from a checkpoint folder what the data side needs.

    Args:
        folder: The checkpoint folder.
        max_slice_nums: Most slices an image is cut into; ``None`` takes the checkpoint's own.
        enable_thinking: ``auto``, ``true`` or ``false``; see ``PromptOptions``.
        train_on: ``all_turns`` or ``last_turn``.
        downsample_mode: ``16x`` or ``4x``, for 4.6 and 4.7; ``None`` takes the checkpoint's own.
        video_fps: Frames taken per second of video; ``None`` takes the generation's own.
        max_num_frames: Most frames (4.5: packs of frames) of a video; ``None`` takes the generation's own.
        img_size: Side of InternLM-XComposer2's images, in pixels; one that is not the checkpoint's is an error.
        hd_num: Most tiles of 4khd; -1 for the models without.

    Returns:
        The checkpoint's ``Processing``.
    """
    generation = read_generation(folder)
    tokenizer = load_tokenizer(folder, generation)
    writer = PromptWriter(
        tokenizer, generation, PromptOptions(enable_thinking=enable_thinking, train_on=train_on)
    )
    wishes = RequestedImageRules(max_slice_nums, downsample_mode, img_size, hd_num)
    image = read_rules(Path(folder), read_config(folder), generation, wishes)
    video = video_rules(
        generation, fps=video_fps, max_num_frames=max_num_frames, settings=image.video_settings
    )
    return Processing(generation, tokenizer, image.rules, image.style, writer, video, image.downsample_mode)


def patches_of(
    pictures: Sequence[Picture], layouts: Sequence[tuple[Layout, ...]], patch_size: int
) -> torch.Tensor:
    """Decode the pictures: the patches of all slices side by side, uint8 ``[3, 14, 14 * sum(L)]``."""
    total = sum(patch_columns(layout) for frames in layouts for layout in frames)
    pixels = np.empty((3, patch_size, total), dtype=np.uint8)
    start = 0
    for picture, frames in zip(pictures, layouts, strict=True):
        for image, layout in zip(picture.frames(), frames, strict=True):
            end = start + patch_columns(layout)
            cut_into_patches(image, layout, pixels[:, :, start:end])
            start = end
    return torch.from_numpy(pixels)


def token_types(
    input_ids: torch.Tensor, tokenizer: PreTrainedTokenizerFast, style: PlaceholderStyle
) -> torch.Tensor:
    """0 for text, 1 for image tokens, 2 for video tokens ``[T]``, as transformers' processor of 4.7 gives."""
    types = torch.zeros_like(input_ids)
    types[input_ids == tokenizer.convert_tokens_to_ids(style.pad)] = 1
    types[input_ids == tokenizer.convert_tokens_to_ids(style.video_pad)] = 2
    return types


def temporal_ids(pictures: Sequence[Picture], layouts: Sequence[tuple[Layout, ...]]) -> torch.Tensor:
    """Of every slice the run of pad tokens it belongs to and its time index, -1 for stills, ``[S, 2]``."""
    return torch.tensor(list(_run_and_time(pictures, layouts)), dtype=torch.int64).reshape(-1, 2)


def _run_and_time(
    pictures: Sequence[Picture], layouts: Sequence[tuple[Layout, ...]]
) -> Iterator[tuple[int, int]]:
    """For every slice, the run it belongs to and its time index, -1 for stills.

    Packed frames are never cut (their rules say one slice), so a frame is a slice.
    """
    run = 0
    for picture, frames in zip(pictures, layouts, strict=True):
        if picture.packs is None:
            for _ in (size for layout in frames for size in layout.tgt_sizes):
                yield run, -1
                run += 1
            continue
        for pack in picture.packs:
            for time in pack:
                yield run, time
            run += 1

"""Everything the data side knows of one checkpoint: ``Processing`` turns conversations into samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from checkpoint import load_tokenizer, read_config
from conversation import Encoded, encode_pieces, truncate
from generations import Generation, detect_generation
from placeholders import Placeholder, PlaceholderStyle, image_placeholder
from prompts import PromptOptions, PromptWriter
from slicing import Layout, Rules, SliceRules, cut_into_patches, patch_columns
from turns import Turn, media_of

Sample = dict[str, Any]


class ProcessingError(ValueError):
    """An option of the data side that this checkpoint can't be given."""


@dataclass(frozen=True)
class Processing:
    """What turns conversations of one checkpoint into samples.

    Attributes:
        generation: The checkpoint's generation.
        tokenizer: Its tokenizer.
        rules: How images are cut.
        style: How images are written into the prompt.
        writer: How conversations are written.
        downsample_mode: ``16x`` or ``4x`` for 4.6 and 4.7 (what the model's forward must be told), else ``None``.
    """

    generation: Generation
    tokenizer: PreTrainedTokenizerFast
    rules: Rules
    style: PlaceholderStyle
    writer: PromptWriter
    downsample_mode: str | None = None

    def encode(self, turns: Sequence[Turn], images: Sequence[Image.Image], *, limit: int | None = None) -> Sample:
        """Turn a conversation with its last answer into a training sample.

        Args:
            turns: The conversation; media are numbered in the order of the text.
            images: The images, mode RGB, by ``Media.index``.
            limit: Longest sequence, in tokens; the rest is cut, never inside an image.

        Returns:
            The sample: ``input_ids`` [T], ``labels`` [T], ``pixel_values`` uint8 [3, 14, 14 * sum(L)],
            ``tgt_sizes`` [S, 2], ``image_bound`` [P, 2], and ``mm_token_type_ids`` [T] for 4.7.
        """
        layouts = [self.rules.layout(*image.size) for image in images]
        encoded = self.encode_text(turns, layouts)
        if limit is not None:
            encoded = truncate(encoded, limit)
        return self._sample(encoded, images, layouts)

    def encode_prompt(
        self, turns: Sequence[Turn], images: Sequence[Image.Image], *, thinking: bool = False
    ) -> Sample:
        """Turn a conversation into what inference gives the model to answer.

        Args:
            turns: The conversation so far; its last turn is the user's.
            images: The images, mode RGB, by ``Media.index``.
            thinking: Whether the model is asked to think first (4.5 and later).

        Returns:
            A sample as of ``encode``, without labels.
        """
        layouts = [self.rules.layout(*image.size) for image in images]
        pieces = self.writer.generation_pieces(turns, thinking=thinking)
        encoded = encode_pieces(pieces, self._placeholders(turns, layouts), self.tokenizer)
        sample = self._sample(encoded, images, layouts)
        del sample["labels"]
        return sample

    def encode_text(self, turns: Sequence[Turn], layouts: Sequence[Layout]) -> Encoded:
        """Encode a conversation with its last answer, from its images' layouts alone."""
        return encode_pieces(
            self.writer.training_pieces(turns), self._placeholders(turns, layouts), self.tokenizer
        )

    def _placeholders(self, turns: Sequence[Turn], layouts: Sequence[Layout]) -> list[Placeholder]:
        return [
            image_placeholder(layouts[media.index], self.style, number=number)
            for number, media in enumerate(media_of(turns))
        ]

    def _sample(self, encoded: Encoded, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> Sample:
        kept = len(encoded.media_spans)
        input_ids = torch.tensor(encoded.input_ids, dtype=torch.int64)
        sizes = [size for layout in layouts[:kept] for size in layout.tgt_sizes]
        sample = {
            "input_ids": input_ids,
            "labels": torch.tensor(encoded.labels, dtype=torch.int64),
            "pixel_values": self._pixels(images[:kept], layouts[:kept]),
            "tgt_sizes": torch.tensor(sizes, dtype=torch.int32).reshape(-1, 2),
            "image_bound": torch.tensor(encoded.image_bound, dtype=torch.int64).reshape(-1, 2),
        }
        if self.generation.name == "v4_7":
            sample["mm_token_type_ids"] = self._token_types(input_ids)
        return sample

    def _pixels(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> torch.Tensor:
        widths = [patch_columns(layout) for layout in layouts]
        pixels = np.empty((3, self.rules.patch_size, sum(widths)), dtype=np.uint8)
        start = 0
        for image, layout, width in zip(images, layouts, widths, strict=True):
            cut_into_patches(image, layout, pixels[:, :, start : start + width])
            start += width
        return torch.from_numpy(pixels)

    def _token_types(self, input_ids: torch.Tensor) -> torch.Tensor:
        """0 for text, 1 for image tokens, 2 for video tokens, as transformers' processor of 4.7 gives."""
        types = torch.zeros_like(input_ids)
        types[input_ids == self.tokenizer.convert_tokens_to_ids(self.style.pad)] = 1
        types[input_ids == self.tokenizer.convert_tokens_to_ids(self.style.video_pad)] = 2
        return types


def load_processing(
    folder: str | Path,
    *,
    max_slice_nums: int | None = None,
    enable_thinking: str = "auto",
    train_on: str = "all_turns",
    downsample_mode: str | None = None,
) -> Processing:
    """Read from a checkpoint folder what the data side needs.

    Args:
        folder: The checkpoint folder.
        max_slice_nums: Most slices an image is cut into; ``None`` takes the checkpoint's own.
        enable_thinking: ``auto``, ``true`` or ``false``; see ``PromptOptions``.
        train_on: ``all_turns`` or ``last_turn``.
        downsample_mode: ``16x`` or ``4x``, for 4.6 and 4.7; ``None`` takes the checkpoint's own.

    Returns:
        The checkpoint's ``Processing``.
    """
    config = read_config(folder)
    special = _added_tokens(Path(folder))
    generation = detect_generation(config, special)
    tokenizer = load_tokenizer(folder, generation)
    writer = PromptWriter(
        tokenizer, generation, PromptOptions(enable_thinking=enable_thinking, train_on=train_on)
    )
    if generation.native:
        from native_slicing import PATCHES_PER_TOKEN, NativeSliceRules  # imports transformers' model package

        settings = _settings(Path(folder), "processor_config.json").get("image_processor", {})
        mode = downsample_mode or settings.get("downsample_mode") or config.get("downsample_mode", "16x")
        native_rules = NativeSliceRules(
            max_slice_nums=_slice_limit(max_slice_nums, settings, config, default=9),
            scale_resolution=settings.get("scale_resolution", 448),
            patch_size=settings.get("patch_size", 14),
            downsample_mode=mode,
        )
        style = PlaceholderStyle(
            pad="<|image_pad|>", video_pad="<|video_pad|>", query_num=0,
            patches_per_token=PATCHES_PER_TOKEN[mode], image_ids=settings.get("use_image_id", True),
        )  # fmt: skip
        return Processing(generation, tokenizer, native_rules, style, writer, mode)
    settings = _settings(Path(folder), "preprocessor_config.json")
    rules = SliceRules(
        max_slice_nums=_slice_limit(max_slice_nums, settings, config, default=1),
        scale_resolution=settings.get("scale_resolution", config.get("scale_resolution", 448)),
        patch_size=config.get("patch_size", 14),
    )
    style = PlaceholderStyle(
        query_num=config["query_num"], image_ids=generation.image_ids, slice_tag=generation.slice_tag
    )
    return Processing(generation, tokenizer, rules, style, writer)


def _slice_limit(wish: int | None, settings: dict[str, Any], config: dict[str, Any], *, default: int) -> int:
    """The most slices: the user's wish, else the released processor's, else the model config's."""
    if wish is not None:
        if wish < 1:
            raise ProcessingError(f"--max_slice_nums: found {wish}, expected at least 1. Use 1 to never cut images.")
        return wish
    if not settings.get("slice_mode", config.get("slice_mode", True)):
        return 1
    nested = config.get("slice_config") or {}
    for source in (settings, nested, config):
        if "max_slice_nums" in source:
            return int(source["max_slice_nums"])
    return default


def _settings(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _added_tokens(folder: Path) -> list[str]:
    decoder = _settings(folder, "tokenizer_config.json").get("added_tokens_decoder", {})
    return [entry["content"] for entry in decoder.values()]

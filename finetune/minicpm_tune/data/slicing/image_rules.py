"""A checkpoint's rules for images, from its configuration and its processor's."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm_tune.checkpoints.model_folder import read_settings
from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.checkpoints.xcomposer2_geometry import PATCH, position_rows, square_side
from minicpm_tune.data.placeholders import PlaceholderStyle
from minicpm_tune.data.slicing.adaptive import Rules, SliceRules
from minicpm_tune.data.slicing.xcomposer2 import SquareRules, TileRules, TileStyle
from minicpm_tune.errors import UserError

logger = logging.getLogger(__name__)

Settings = dict[str, Any]

# 4khd's tiles when nothing says how many: what it was trained with ("HD-25", arXiv:2404.06512).
DEFAULT_TILES = 25


class RulesError(UserError):
    """An option of the data side that a checkpoint can't be given."""


@dataclass(frozen=True)
class ImageRules:
    """How images are cut and written.

    Attributes:
        rules: How images are cut.
        style: How they are written into the prompt.
        downsample_mode: ``16x`` or ``4x`` for 4.6 and 4.7, else ``None``.
        video_settings: ``video_processor`` of processor_config.json, for 4.6 and 4.7.
    """

    rules: Rules
    style: PlaceholderStyle
    downsample_mode: str | None
    video_settings: Settings


@dataclass(frozen=True)
class RequestedImageRules:
    """What the user wants of the rules; the names are those of the flags. None: as the checkpoint says.

    Attributes:
        max_slice_nums: Most slices an image is cut into.
        downsample_mode: ``16x`` or ``4x``, for 4.6 and 4.7.
        img_size: Side of the square that InternLM-XComposer2 sees, in pixels; for 4khd of no meaning.
        hd_num: Most tiles of 4khd, in the place of ``max_slice_nums``; -1 for the models without tiles.
    """

    max_slice_nums: int | None = None
    downsample_mode: str | None = None
    img_size: int | None = None
    hd_num: int | None = None


def read_rules(
    folder: Path, config: Settings, generation: Generation, wishes: RequestedImageRules
) -> ImageRules:
    """Read the rules; what the released processor is configured with goes before the model's config.

    Args:
        folder: The checkpoint folder.
        config: Its config.json.
        generation: Its generation.
        wishes: What the user wants.

    Raises:
        RulesError: When an option does not fit the checkpoint.
    """
    if wishes.max_slice_nums is not None and wishes.max_slice_nums < 1:
        raise RulesError(
            f"--max_slice_nums: found {wishes.max_slice_nums}, expected at least 1. Use 1 to never cut images."
        )
    if not generation.downsampling and wishes.downsample_mode is not None:
        raise RulesError(
            f"--downsample_mode: {generation.title} has none, expected MiniCPM-V 4.6 or 4.7. Leave it out."
        )
    if generation.slicing not in ("square", "tiles"):
        _refuse_xcomposer2_wishes(generation, wishes)
    return _READERS[generation.slicing](folder, config, generation, wishes)


def _refuse_xcomposer2_wishes(generation: Generation, wishes: RequestedImageRules) -> None:
    for flag, instead in (("img_size", "Leave it out"), ("hd_num", "Use --max_slice_nums")):
        if getattr(wishes, flag) is not None:
            raise RulesError(
                f"--{flag}: {generation.title} has none, expected InternLM-XComposer2. {instead}."
            )


def _slice_rules(
    folder: Path, config: Settings, generation: Generation, wishes: RequestedImageRules
) -> ImageRules:
    settings = read_settings(folder, "preprocessor_config.json")
    rules = SliceRules(
        max_slice_nums=_slice_limit(wishes.max_slice_nums, settings, config, default=1),
        scale_resolution=int(settings.get("scale_resolution") or config.get("scale_resolution", 448)),
        patch_size=config.get("patch_size", 14),
    )
    style = PlaceholderStyle(
        query_num=config["query_num"], image_ids=generation.image_ids, slice_tag=generation.slice_tag
    )
    return ImageRules(rules, style, None, {})


def _native_rules(
    folder: Path, config: Settings, generation: Generation, wishes: RequestedImageRules
) -> ImageRules:
    # Imported here: it brings in transformers' model package, which the other generations don't need.
    from minicpm_tune.data.slicing.minicpmv46 import NativeSliceRules

    processor = read_settings(folder, "processor_config.json")
    settings = processor.get("image_processor", {})
    mode = wishes.downsample_mode or settings.get("downsample_mode") or config.get("downsample_mode", "16x")
    if mode not in generation.downsampling:
        raise RulesError(f"--downsample_mode: found {mode!r}, expected 16x or 4x. Choose one of the two.")
    rules = NativeSliceRules(
        max_slice_nums=_slice_limit(wishes.max_slice_nums, settings, config, default=9),
        scale_resolution=settings.get("scale_resolution", 448),
        patch_size=settings.get("patch_size", 14),
        downsample_mode=mode,
    )
    image_ids = settings.get("use_image_id", True)
    style = PlaceholderStyle(
        pad="<|image_pad|>",
        video_pad="<|video_pad|>",
        query_num=0,
        patches_per_token=generation.downsampling[mode].patches_per_token,
        image_ids=image_ids,
        video_ids=image_ids and generation.video_ids,
        frame_separator="",
    )
    return ImageRules(rules, style, mode, processor.get("video_processor", {}))


def _square_rules(
    folder: Path, config: Settings, generation: Generation, wishes: RequestedImageRules
) -> ImageRules:
    side = square_side(config, tiles=False, positions=position_rows(folder))
    pixels = side * PATCH
    if wishes.img_size not in (None, pixels):
        raise RulesError(
            f"--img_size: found {wishes.img_size}, expected {pixels}, which is what this checkpoint "
            f"({generation.title}) sees. Use --img_size {pixels}, or leave it out."
        )
    if wishes.hd_num not in (None, -1):
        raise RulesError(
            f"--hd_num: found {wishes.hd_num}, expected -1: {generation.title} does not cut images. Use --hd_num -1, "
            "or an internlm-xcomposer2-4khd-7b checkpoint."
        )
    style = PlaceholderStyle(query_num=side * side, image_ids=False, slice_tag="")
    return ImageRules(SquareRules(side), style, None, {})


def _tile_rules(
    folder: Path, config: Settings, generation: Generation, wishes: RequestedImageRules
) -> ImageRules:
    side = square_side(config, tiles=True, positions=position_rows(folder))
    if wishes.hd_num is not None and wishes.hd_num < 1:
        raise RulesError(
            f"--hd_num: found {wishes.hd_num}, expected at least 1: {generation.title} cuts images into up to so many "
            "tiles. Use for example --hd_num 16."
        )
    if wishes.img_size is not None:
        logger.info(
            "--img_size has no meaning for %s: its tiles have %d pixels.", generation.title, side * PATCH
        )
    tiles = wishes.hd_num if wishes.hd_num is not None else wishes.max_slice_nums
    rules = TileRules(side, max_slice_nums=DEFAULT_TILES if tiles is None else tiles)
    return ImageRules(rules, TileStyle(image_ids=False, slice_tag="", query_num=0, side=side), None, {})


_READERS = {
    "adaptive": _slice_rules, "minicpmv46": _native_rules, "square": _square_rules, "tiles": _tile_rules,
}  # fmt: skip


def _slice_limit(wish: int | None, settings: Settings, config: Settings, *, default: int) -> int:
    """The most slices: the user's wish, else the released processor's, else the model config's."""
    if wish is not None:
        return wish
    if not settings.get("slice_mode", config.get("slice_mode", True)):
        return 1
    nested = config.get("slice_config") or {}
    for source in (settings, nested, config):
        if "max_slice_nums" in source:
            return int(source["max_slice_nums"])
    return default

"""A checkpoint's rules for images, from its configuration and its processor's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint import read_settings
from generations import Generation
from placeholders import PlaceholderStyle
from slicing import Rules, SliceRules

Settings = dict[str, Any]


class RulesError(ValueError):
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


def read_rules(
    folder: Path,
    config: Settings,
    generation: Generation,
    *,
    max_slice_nums: int | None,
    downsample_mode: str | None,
) -> ImageRules:
    """Read the rules; what the released processor is configured with goes before the model's config.

    Args:
        folder: The checkpoint folder.
        config: Its config.json.
        generation: Its generation.
        max_slice_nums: The user's limit of slices; ``None`` takes the checkpoint's own.
        downsample_mode: ``16x`` or ``4x``, for 4.6 and 4.7; ``None`` takes the checkpoint's own.

    Raises:
        RulesError: When an option does not fit the checkpoint.
    """
    if max_slice_nums is not None and max_slice_nums < 1:
        raise RulesError(
            f"--max_slice_nums: found {max_slice_nums}, expected at least 1. Use 1 to never cut images."
        )
    if generation.native:
        return _native_rules(folder, config, max_slice_nums, downsample_mode)
    if downsample_mode is not None:
        raise RulesError(
            f"--downsample_mode: {generation.title} has none, expected MiniCPM-V 4.6 or 4.7. Leave it out."
        )
    settings = read_settings(folder, "preprocessor_config.json")
    rules = SliceRules(
        max_slice_nums=_slice_limit(max_slice_nums, settings, config, default=1),
        scale_resolution=int(settings.get("scale_resolution") or config.get("scale_resolution", 448)),
        patch_size=config.get("patch_size", 14),
    )
    style = PlaceholderStyle(
        query_num=config["query_num"], image_ids=generation.image_ids, slice_tag=generation.slice_tag
    )
    return ImageRules(rules, style, None, {})


def _native_rules(
    folder: Path, config: Settings, max_slice_nums: int | None, downsample_mode: str | None
) -> ImageRules:
    # Imported here: it brings in transformers' model package, which the other generations don't need.
    from native_slicing import PATCHES_PER_TOKEN, NativeSliceRules

    processor = read_settings(folder, "processor_config.json")
    settings = processor.get("image_processor", {})
    mode = downsample_mode or settings.get("downsample_mode") or config.get("downsample_mode", "16x")
    if mode not in PATCHES_PER_TOKEN:
        raise RulesError(f"--downsample_mode: found {mode!r}, expected 16x or 4x. Choose one of the two.")
    rules = NativeSliceRules(
        max_slice_nums=_slice_limit(max_slice_nums, settings, config, default=9),
        scale_resolution=settings.get("scale_resolution", 448),
        patch_size=settings.get("patch_size", 14),
        downsample_mode=mode,
    )
    image_ids = settings.get("use_image_id", True)
    style = PlaceholderStyle(
        pad="<|image_pad|>",
        video_pad="<|video_pad|>",
        query_num=0,
        patches_per_token=PATCHES_PER_TOKEN[mode],
        image_ids=image_ids,
        # transformers' processor of 4.7 writes no number before a video, that of 4.6 does
        video_ids=image_ids and config.get("model_type") == "minicpmv4_6",
        frame_separator="",
    )
    return ImageRules(rules, style, mode, processor.get("video_processor", {}))


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

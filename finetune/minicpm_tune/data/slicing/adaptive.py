"""The slicing rules of MiniCPM-V 2.0 to 4.5."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minicpm_tune.checkpoints.model_folder import read_settings
from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.data.media.audio import AudioRules
from minicpm_tune.data.media.films import FilmRules
from minicpm_tune.data.media.videos import VideoRules
from minicpm_tune.data.placeholders import PlaceholderStyle
from minicpm_tune.data.slicing.layouts import Grid, ImageLayout, Size, checked_size
from minicpm_tune.data.slicing.media_rules import MediaRules, log_assumed, slice_limit
from minicpm_tune.settings.data_arguments import DataArguments


@dataclass(frozen=True)
class SliceRules:
    """The slicing rules of MiniCPM-V 2.0 to 4.5.

    Source: "MiniCPM-V: A GPT-4V Level MLLM on Your Phone" (arXiv:2408.01800), adaptive visual encoding.
    Held against the released code's sizes and pixels by ``tests/data/test_slicing.py``.

    Attributes:
        max_slice_nums: Most slices an image is cut into, the overview not counted; 1 means never cut.
        scale_resolution: Side of the square the encoder was trained on, in pixels.
        patch_size: Side of a patch, in pixels.

    Example:
        >>> SliceRules().layout(1200, 500).tgt_sizes
        [(21, 50), (29, 35), (29, 35)]
    """

    max_slice_nums: int = 9
    scale_resolution: int = 448
    patch_size: int = 14

    def layout(self, width: int, height: int) -> ImageLayout:
        """Decide how an image is resized and cut.

        Args:
            width: Image width, in pixels; at least 1.
            height: Image height, in pixels; at least 1.

        Returns:
            The sizes of the overview and of the slices.

        Raises:
            RowError: If a side is below 1.
        """
        grid = choose_grid(
            width, height, max_slice_nums=self.max_slice_nums, scale_resolution=self.scale_resolution
        )
        overview = self._best_size(width, height, upscale=grid is None)
        refined = None
        if grid is not None:
            cell = self._best_size(
                _nearest_multiple(width, grid.columns) / grid.columns,
                _nearest_multiple(height, grid.rows) / grid.rows,
                upscale=True,
            )
            refined = Size(cell.width * grid.columns, cell.height * grid.rows)
        return ImageLayout(overview, grid, refined, self.patch_size)

    def limited(self, max_slice_nums: int) -> SliceRules:
        """The same rules with another limit of slices."""
        return replace(self, max_slice_nums=max_slice_nums)

    def _best_size(self, width: float, height: float, *, upscale: bool) -> Size:
        side = self.scale_resolution
        if upscale or width * height > side * side:
            ratio = width / height
            height = int(side / math.sqrt(ratio))
            width = int(height * ratio)
        return Size(_nearest_multiple(width, self.patch_size), _nearest_multiple(height, self.patch_size))


def choose_grid(width: int, height: int, *, max_slice_nums: int, scale_resolution: int) -> Grid | None:
    """Choose how many slices an image is cut into, and in which arrangement.

    The ideal count is the image's area divided by the area the encoder was trained on. Among the
    arrangements with that count, one fewer, or one more, the one whose shape is closest to the image's
    (in log aspect ratio) wins; the earliest candidate wins a tie.

    Source: "MiniCPM-V: A GPT-4V Level MLLM on Your Phone" (arXiv:2408.01800), adaptive visual encoding.

    Args:
        width: Image width, in pixels; at least 1.
        height: Image height, in pixels; at least 1.
        max_slice_nums: Most slices allowed, the overview not counted.
        scale_resolution: Side of the square the encoder was trained on, in pixels.

    Returns:
        The grid, or ``None`` when the image is small enough to be used whole.

    Raises:
        RowError: If a side is below 1.

    Example:
        >>> choose_grid(1344, 896, max_slice_nums=9, scale_resolution=448)
        Grid(columns=3, rows=2)
    """
    checked_size(width, height)
    ideal = min(math.ceil(width * height / scale_resolution**2), max_slice_nums)
    if ideal <= 1:
        return None
    shape = math.log(width / height)
    best, best_error = None, math.inf
    for grid in _candidates(ideal, max_slice_nums):
        error = abs(shape - math.log(grid.columns / grid.rows))
        if error < best_error:
            best, best_error = grid, error
    return best


def _candidates(ideal: int, max_slice_nums: int) -> Iterator[Grid]:
    for count in (ideal - 1, ideal, ideal + 1):
        if count == 1 or count > max_slice_nums:
            continue
        for columns in range(1, count + 1):
            if count % columns == 0:
                yield Grid(columns, count // columns)


def _nearest_multiple(length: float, divisor: int) -> int:
    # Python's round goes half to even; the released code relies on it.
    return max(round(length / divisor) * divisor, divisor)


def read_rules(
    folder: Path, config: dict[str, Any], generation: Generation, arguments: DataArguments
) -> MediaRules:
    """Read the rules; what the released processor is configured with goes before the model's config."""
    settings = read_settings(folder, "preprocessor_config.json")
    rules = SliceRules(
        max_slice_nums=slice_limit(arguments, settings, config, default=1),
        scale_resolution=int(settings.get("scale_resolution") or config.get("scale_resolution", 448)),
        patch_size=config.get("patch_size", 14),
    )
    style = PlaceholderStyle(
        query_num=config["query_num"],
        image_ids=generation.image_ids and settings.get("use_image_id", True),
        slice_tag=generation.slice_tag,
    )
    used = {
        "max_slice_nums": rules.max_slice_nums,
        "scale_resolution": rules.scale_resolution,
        "patch_size": rules.patch_size,
    }
    used |= {"use_image_id": style.image_ids} if generation.image_ids else {}
    log_assumed(folder, "preprocessor_config.json", used, config, config.get("slice_config") or {})
    return MediaRules(
        rules,
        style,
        _video_rules(generation, arguments),
        audio=_audio_rules(generation, config),
        film=_film_rules(generation, config, arguments),
    )


def _audio_rules(generation: Generation, config: dict[str, Any]) -> AudioRules | None:
    if generation.hearing is None or not config.get("init_audio", True):
        return None
    return AudioRules(config.get("audio_pool_step", 2), generation.hearing.per_second)


def _film_rules(generation: Generation, config: dict[str, Any], arguments: DataArguments) -> FilmRules | None:
    if generation.hearing is None or not config.get("init_audio", True):
        return None
    units = bool(generation.hearing.unit)
    most = None if units else 64
    return FilmRules(units, most).for_one(arguments.video_fps, arguments.max_num_frames)


def _video_rules(generation: Generation, arguments: DataArguments) -> VideoRules | None:
    """Source: the released README files of 2.6 and 4.5 (``encode_video``)."""
    if generation.frames is None:
        return None
    if generation.frames == "packs":
        return VideoRules.requested(
            arguments, "packs", fps=3.0, max_num_frames=180, max_slice_nums=1, max_frames_per_pack=3
        )
    return VideoRules.requested(arguments, "step", fps=1.0, max_num_frames=64, max_slice_nums=2)

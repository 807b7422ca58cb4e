"""The slicing rules of MiniCPM-V 4.6 and 4.7 and MiniCPM-OCR, taken from transformers' own image processor.

They use ``MiniCPMV4_6ImageProcessorPil``: sides are multiples of 4 patches (2 with downsample mode 4x),
because the vision tower merges patches before the language model sees them. Only its size rules
are used here; resizing and cutting is ``layouts.cut_into_patches``, which gives the same pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

from minicpm_tune.checkpoints.model_folder import read_settings
from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.data.media.videos import VideoRules
from minicpm_tune.data.placeholders import PlaceholderStyle
from minicpm_tune.data.slicing.layouts import Grid, ImageLayout, Size, checked_size
from minicpm_tune.data.slicing.media_rules import MediaRules, log_assumed, slice_limit
from minicpm_tune.errors import DataError
from minicpm_tune.settings.data_arguments import DataArguments


class MergedSliceRules:
    """The slicing rules of 4.6 and 4.7, whose vision tower merges neighboring patches.

    Args:
        max_slice_nums: Most slices an image is cut into, the overview not counted; 1 means never cut.
        scale_resolution: Side of the square the encoder was trained on, in pixels.
        patch_size: Side of a patch, in pixels.
        downsample_mode: ``16x`` or ``4x``: patches that become one token.
        upsizes: Whether an image that is not cut is enlarged to ``scale_resolution`` where it is smaller.

    Example:
        >>> MergedSliceRules(max_slice_nums=9).layout(1200, 500).tgt_sizes
        [(20, 48), (28, 36), (28, 36)]
    """

    def __init__(
        self,
        *,
        max_slice_nums: int = 9,
        scale_resolution: int = 448,
        patch_size: int = 14,
        downsample_mode: str = "16x",
        upsizes: bool = True,
    ) -> None:
        self.max_slice_nums = max_slice_nums
        self.scale_resolution = scale_resolution
        self.patch_size = patch_size
        self.downsample_mode = downsample_mode
        self.upsizes = upsizes
        self._processor = MiniCPMV4_6ImageProcessorPil()

    def layout(self, width: int, height: int) -> ImageLayout:
        """Decide how an image of this size, in pixels, is resized and cut."""
        checked_size(width, height)
        size = (height, width)
        shared = (self.scale_resolution, self.patch_size, self.downsample_mode)
        cut = self._processor.get_sliced_grid(size, self.max_slice_nums, self.scale_resolution)
        overview_height, overview_width = self._processor.find_best_resize(
            size, *shared, cut is None and self.upsizes
        )
        overview = Size(overview_width, overview_height)
        if cut is None:
            return ImageLayout(overview, None, None, self.patch_size)
        refined_height, refined_width = self._processor.get_refine_size(size, cut, *shared, True)
        grid = Grid(columns=cut[1], rows=cut[0])
        return ImageLayout(overview, grid, Size(refined_width, refined_height), self.patch_size)

    def limited(self, max_slice_nums: int) -> MergedSliceRules:
        """The same rules with another limit of slices."""
        return MergedSliceRules(
            max_slice_nums=max_slice_nums,
            scale_resolution=self.scale_resolution,
            patch_size=self.patch_size,
            downsample_mode=self.downsample_mode,
            upsizes=self.upsizes,
        )


def read_rules(
    folder: Path, config: dict[str, Any], generation: Generation, arguments: DataArguments
) -> MediaRules:
    """Read the rules; what the released processor is configured with goes before the model's config."""
    processor = read_settings(folder, "processor_config.json")
    settings = processor.get("image_processor") or read_settings(folder, "preprocessor_config.json")
    default = config.get("downsample_mode", generation.downsample_mode)
    mode = arguments.downsample_mode or settings.get("downsample_mode") or default
    if mode not in generation.downsampling:
        raise DataError(f"--downsample_mode: found {mode!r}, expected 16x or 4x. Choose one of the two.")
    rules = MergedSliceRules(
        max_slice_nums=slice_limit(arguments, settings, config, default=9),
        scale_resolution=settings.get("scale_resolution", 448),
        patch_size=settings.get("patch_size", 14),
        downsample_mode=mode,
        upsizes=_upsizes(folder, settings),
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
    used = {
        "max_slice_nums": rules.max_slice_nums,
        "scale_resolution": rules.scale_resolution,
        "patch_size": rules.patch_size,
        "downsample_mode": mode,
        "use_image_id": image_ids,
    }
    log_assumed(folder, "processor_config.json", used, config)
    video = processor.get("video_processor") or read_settings(folder, "video_preprocessor_config.json")
    return MediaRules(rules, style, _video_rules(video, arguments), mode)


def _upsizes(folder: Path, settings: dict[str, Any]) -> bool:
    """MiniCPM-OCR's ``small_image_upsize``; the others always enlarge small images."""
    wish = settings.get("small_image_upsize", "always")
    if wish not in ("always", "never"):
        raise DataError(
            f"{folder}: the processor's settings have small_image_upsize {wish!r}, expected always or never: "
            "adaptive sizes depend on what is in the picture, and can't be planned here. Set it to always in "
            "processor_config.json, which goes with the trained model, so that inference does the same."
        )
    return wish == "always"


def _video_rules(settings: dict[str, Any], arguments: DataArguments) -> VideoRules:
    """Source: transformers' MiniCPMV4_6VideoProcessor."""
    return VideoRules.requested(
        arguments,
        "seconds",
        fps=1.0,
        max_num_frames=settings.get("max_num_frames", 128),
        max_slice_nums=settings.get("max_slice_nums", 9) if settings.get("slice_mode", True) else 1,
        stack_frames=arguments.stack_frames or settings.get("stack_frames", 1),
    )

"""What a checkpoint says about images and videos; every family's module beside this one reads its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minicpm_tune.data.media.videos import VideoRules
from minicpm_tune.data.placeholders import PlaceholderStyle
from minicpm_tune.data.slicing.layouts import SlicingRules
from minicpm_tune.settings.data_arguments import DataArguments


@dataclass(frozen=True)
class MediaRules:
    """How images and videos are cut and written into the prompt.

    Attributes:
        slicing: How images are cut.
        style: How they are written into the prompt.
        video: How videos are sampled; None for generations without video.
        downsample_mode: ``16x`` or ``4x`` for 4.6 and 4.7 (the model must use the same), else None.
    """

    slicing: SlicingRules
    style: PlaceholderStyle
    video: VideoRules | None = None
    downsample_mode: str | None = None


def slice_limit(
    arguments: DataArguments, settings: dict[str, Any], config: dict[str, Any], *, default: int
) -> int:
    """The most slices: the user's, else the released processor's, else the model config's."""
    if arguments.max_slice_nums is not None:
        return arguments.max_slice_nums
    if not settings.get("slice_mode", config.get("slice_mode", True)):
        return 1
    for source in (settings, config.get("slice_config") or {}, config):
        if "max_slice_nums" in source:
            return int(source["max_slice_nums"])
    return default

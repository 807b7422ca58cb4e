"""What a checkpoint says about images and videos; every family's module beside this one reads its own."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm_tune import processes
from minicpm_tune.data.media.audio import AudioRules
from minicpm_tune.data.media.films import FilmRules
from minicpm_tune.data.media.videos import VideoRules
from minicpm_tune.data.placeholders import PlaceholderStyle
from minicpm_tune.data.slicing.layouts import SlicingRules
from minicpm_tune.settings.data_arguments import DataArguments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MediaRules:
    """How images and videos are cut and written into the prompt.

    Attributes:
        slicing: How images are cut.
        style: How they are written into the prompt.
        video: How videos are sampled; None for generations without video.
        audio: How audio becomes tokens; None for generations that take none.
        film: How a video is cut together with its sound; None where audio is.
        downsample_mode: ``16x`` or ``4x`` for 4.6 and 4.7 (the model must use the same), else None.
    """

    slicing: SlicingRules
    style: PlaceholderStyle
    video: VideoRules | None = None
    downsample_mode: str | None = None
    audio: AudioRules | None = None
    film: FilmRules | None = None


def log_assumed(folder: Path, file: str, values: dict[str, Any], *sources: dict[str, Any]) -> None:
    """Log what is assumed of a checkpoint that lacks a processor's file, key by key.

    Args:
        folder: The model folder.
        file: The file's name.
        values: What is used, by the file's keys.
        sources: The other files' contents, in which some keys were found.
    """
    if (folder / file).is_file() or processes.rank():
        return
    guessed = {key for key in values if not any(key in source for source in sources)}
    if guessed:
        told = [
            f"{key} {value} ({'assumed' if key in guessed else 'config.json'})"
            for key, value in values.items()
        ]
        logger.warning("%s has no %s. Images are cut and written with %s.", folder, file, ", ".join(told))


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

"""Which module reads a checkpoint's rules for images and videos, and which flags it knows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from minicpm_tune.checkpoints.model_folder import read_config
from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.data.slicing import adaptive, xcomposer2
from minicpm_tune.data.slicing.media_rules import MediaRules
from minicpm_tune.errors import DataError
from minicpm_tune.settings.data_arguments import DataArguments

Reader = Callable[[Path, dict[str, Any], Generation, DataArguments], MediaRules]


def _read_merged(
    folder: Path, config: dict[str, Any], generation: Generation, arguments: DataArguments
) -> MediaRules:
    # Imported here: it brings in transformers' model package, which the other families don't need.
    from minicpm_tune.data.slicing import minicpmv46

    return minicpmv46.read_rules(folder, config, generation, arguments)


# By ``Generation.slicing``.
_READERS: dict[str, Reader] = {
    "adaptive": adaptive.read_rules,
    "minicpmv46": _read_merged,
    "square": xcomposer2.read_square_rules,
    "tiles": xcomposer2.read_tile_rules,
}
# Flags that only some ways of slicing know: those ways, their models, and what the others should do.
_SPECIAL_FLAGS = {
    "downsample_mode": (("minicpmv46",), "MiniCPM-V 4.6 or 4.7 or MiniCPM-OCR", "Leave it out"),
    "stack_frames": (("minicpmv46",), "MiniCPM-V 4.6 or 4.7 or MiniCPM-OCR", "Leave it out"),
    "img_size": (("square", "tiles"), "InternLM-XComposer2", "Leave it out"),
    "hd_num": (("square", "tiles"), "InternLM-XComposer2", "Use --max_slice_nums"),
}


def read_media_rules(folder: Path, generation: Generation, arguments: DataArguments) -> MediaRules:
    """Read how a checkpoint cuts and writes images and videos.

    Args:
        folder: The model folder.
        generation: Its generation.
        arguments: What the user wants; None in a field means what the checkpoint says.

    Raises:
        DataError: When an option does not fit the checkpoint.
    """
    if arguments.max_slice_nums is not None and arguments.max_slice_nums < 1:
        raise DataError(
            f"--max_slice_nums: found {arguments.max_slice_nums}, expected at least 1. Use 1 to never cut images."
        )
    if arguments.audio_prompt is not None and generation.hearing is None:
        raise DataError(
            f"--audio_prompt: {generation.title} takes no audio, expected MiniCPM-o 2.6 or 4.5. Leave it out."
        )
    for flag, (ways, models, advice) in _SPECIAL_FLAGS.items():
        if getattr(arguments, flag) is not None and generation.slicing not in ways:
            raise DataError(f"--{flag}: {generation.title} has none, expected {models}. {advice}.")
    if arguments.video_sound and generation.hearing is None:
        raise DataError(
            f"--video_sound true: {generation.title} takes no audio, expected MiniCPM-o. Leave it out: videos "
            "are then used without their sound."
        )
    return _READERS[generation.slicing](folder, read_config(folder), generation, arguments)

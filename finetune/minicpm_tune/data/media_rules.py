"""What a checkpoint's files say about images and videos: how each family cuts them and writes them into the prompt."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm_tune import processes
from minicpm_tune.checkpoints.model_folder import read_config, read_settings
from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.checkpoints.xcomposer2_geometry import PATCH, position_rows, square_side
from minicpm_tune.data.media.audio import AudioRules
from minicpm_tune.data.media.films import FilmRules
from minicpm_tune.data.media.videos import VideoRules
from minicpm_tune.data.placeholders import PlaceholderStyle, TileStyle
from minicpm_tune.data.slicing.adaptive import MergedSliceRules, SliceRules
from minicpm_tune.data.slicing.layouts import SlicingRules
from minicpm_tune.data.slicing.xcomposer2 import SquareRules, TileRules
from minicpm_tune.errors import DataError
from minicpm_tune.settings.data_arguments import DataArguments

logger = logging.getLogger(__name__)

# 4khd's tiles when nothing says how many: what it was trained with ("HD-25", arXiv:2404.06512).
DEFAULT_TILES = 25


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


# By ``Generation.frames``. Source: the released README files of 2.6 and 4.5 (``encode_video``).
_SAMPLING = {
    "step": VideoRules("step", fps=1.0, max_num_frames=64, max_slice_nums=2),
    "packs": VideoRules("packs", fps=3.0, max_num_frames=180, max_slice_nums=1, max_frames_per_pack=3),
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


def _log_assumed(folder: Path, file: str, values: dict[str, Any], *sources: dict[str, Any]) -> None:
    """Log what is assumed of a checkpoint that lacks a processor's file, by its keys; ``sources``: other files."""
    if (folder / file).is_file() or processes.rank():
        return
    guessed = {key for key in values if not any(key in source for source in sources)}
    if guessed:
        told = [
            f"{key} {value} ({'assumed' if key in guessed else 'config.json'})"
            for key, value in values.items()
        ]
        logger.warning("%s has no %s. Images are cut and written with %s.", folder, file, ", ".join(told))


def _slice_limit(
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


def _adaptive_rules(
    folder: Path, config: dict[str, Any], generation: Generation, arguments: DataArguments
) -> MediaRules:
    """MiniCPM-V 2.0 to 4.5: what the released processor is configured with goes before the model's config."""
    settings = read_settings(folder, "preprocessor_config.json")
    rules = SliceRules(
        max_slice_nums=_slice_limit(arguments, settings, config, default=1),
        scale_resolution=int(settings.get("scale_resolution") or config.get("scale_resolution", 448)),
        patch_size=config.get("patch_size", 14),
    )
    style = PlaceholderStyle(
        query_num=config["query_num"],
        image_ids=generation.image_ids and settings.get("use_image_id", True),
        slice_tag=generation.slice_tag,
    )
    used = vars(rules) | ({"use_image_id": style.image_ids} if generation.image_ids else {})
    _log_assumed(folder, "preprocessor_config.json", used, config, config.get("slice_config") or {})
    wished = (arguments.video_fps, arguments.max_num_frames)
    video = None if generation.frames is None else _SAMPLING[generation.frames].for_one(*wished)
    audio = film = None
    if generation.hearing is not None and config.get("init_audio", True):
        audio = AudioRules(config.get("audio_pool_step", 2), generation.hearing.per_second)
        units = bool(generation.hearing.unit)
        film = FilmRules(units, None if units else 64).for_one(*wished)
    return MediaRules(rules, style, video, audio=audio, film=film)


def _merged_rules(
    folder: Path, config: dict[str, Any], generation: Generation, arguments: DataArguments
) -> MediaRules:
    """MiniCPM-V 4.6 and 4.7 and MiniCPM-OCR: here, too, the processor goes before the model's config."""
    processor = read_settings(folder, "processor_config.json")
    settings = processor.get("image_processor") or read_settings(folder, "preprocessor_config.json")
    default = config.get("downsample_mode", generation.downsample_mode)
    mode = arguments.downsample_mode or settings.get("downsample_mode") or default
    if mode not in generation.downsampling:
        raise DataError(f"--downsample_mode: found {mode!r}, expected 16x or 4x. Choose one of the two.")
    rules = MergedSliceRules(
        max_slice_nums=_slice_limit(arguments, settings, config, default=9),
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
    used = {key: value for key, value in vars(rules).items() if key != "upsizes"} | {
        "use_image_id": image_ids
    }
    _log_assumed(folder, "processor_config.json", used, config)
    video = processor.get("video_processor") or read_settings(folder, "video_preprocessor_config.json")
    # Source: transformers' MiniCPMV4_6VideoProcessor.
    video_rules = VideoRules(
        "seconds",
        fps=1.0,
        max_num_frames=video.get("max_num_frames", 128),
        max_slice_nums=video.get("max_slice_nums", 9) if video.get("slice_mode", True) else 1,
        stack_frames=arguments.stack_frames or video.get("stack_frames", 1),
    ).for_one(arguments.video_fps, arguments.max_num_frames)
    return MediaRules(rules, style, video_rules, mode)


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


def _square_rules(
    folder: Path, config: dict[str, Any], generation: Generation, arguments: DataArguments
) -> MediaRules:
    """The rules of 7b and vl-7b."""
    side = square_side(config, tiles=False, positions=position_rows(folder))
    pixels = side * PATCH
    if arguments.img_size not in (None, pixels):
        raise DataError(
            f"--img_size: found {arguments.img_size}, expected {pixels}, which is what this checkpoint "
            f"({generation.title}) sees. Use --img_size {pixels}, or leave it out."
        )
    if arguments.hd_num not in (None, -1):
        raise DataError(
            f"--hd_num: found {arguments.hd_num}, expected -1: {generation.title} does not cut images. Use --hd_num "
            "-1, or an internlm-xcomposer2-4khd-7b checkpoint."
        )
    style = PlaceholderStyle(query_num=side * side, image_ids=False, slice_tag="")
    return MediaRules(SquareRules(side), style)


def _tile_rules(
    folder: Path, config: dict[str, Any], generation: Generation, arguments: DataArguments
) -> MediaRules:
    """The rules of 4khd."""
    side = square_side(config, tiles=True, positions=position_rows(folder))
    if arguments.hd_num is not None and arguments.hd_num < 1:
        raise DataError(
            f"--hd_num: found {arguments.hd_num}, expected at least 1: {generation.title} cuts images into up to so "
            "many tiles. Use for example --hd_num 16."
        )
    if arguments.img_size is not None:
        logger.info(
            "--img_size has no meaning for %s: its tiles have %d pixels.", generation.title, side * PATCH
        )
    tiles = arguments.max_slice_nums if arguments.hd_num is None else arguments.hd_num
    rules = TileRules(side, max_slice_nums=DEFAULT_TILES if tiles is None else tiles)
    return MediaRules(rules, TileStyle(image_ids=False, slice_tag="", query_num=0, side=side))


# By ``Generation.slicing``.
_READERS: dict[str, Callable[[Path, dict[str, Any], Generation, DataArguments], MediaRules]] = {
    "adaptive": _adaptive_rules,
    "minicpmv46": _merged_rules,
    "square": _square_rules,
    "tiles": _tile_rules,
}

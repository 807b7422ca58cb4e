"""A model ready to answer: checkpoint, adapter, device and precision."""

from __future__ import annotations

import logging
from argparse import Namespace
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minicpm_tune.checkpoints.model_folder import resolve_model_folder, stored_dtype
from minicpm_tune.data.samples import Processing, load_processing
from minicpm_tune.errors import UserError
from minicpm_tune.lora.adapter_folders import AdapterFolder, check_base, read_adapter_folder
from minicpm_tune.models.loading import add_token_rows, load_model
from minicpm_tune.processes import local_rank
from minicpm_tune.settings.data_arguments import DEFAULT_MAX_PIXELS, DataArguments
from minicpm_tune.settings.hardware import best_precision

logger = logging.getLogger(__name__)

DTYPE_NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# A checkpoint whose files are larger than this, in bytes, stays in 16 bit on a CPU too.
_SMALL_CHECKPOINT = 2**31


class InferenceError(UserError):
    """A model that can't be loaded as asked."""


@dataclass(frozen=True)
class ModelChoice:
    """Which model answers, and how it is loaded; the names are those of the flags.

    Attributes:
        model_name_or_path: A checkpoint's folder or Hub id, or an adapter's folder; None takes the base of
            ``adapter``.
        adapter: Folder of an adapter, or None.
        dtype: ``auto``, ``bf16``, ``fp16`` or ``fp32``.
        device: ``auto`` or a torch device.
        load_4bit: Whether the LLM is loaded in 4 bit.
        attn_implementation: transformers' attention for the LLM.
        cache_dir: Where checkpoints from the Hub are kept.
        max_slice_nums: Most slices an image is cut into; None takes the checkpoint's.
        video_fps: Frames taken per second of video; None takes the generation's.
        max_num_frames: Most frames of a video; None takes the generation's.
        downsample_mode: ``4x`` or ``16x`` for 4.6 and 4.7; None takes the adapter's, else the checkpoint's.
        video_sound: Whether videos are taken with their sound, for MiniCPM-o.
        stack_frames: Frames shown per second of a film, for 4.6 and 4.7; None takes the checkpoint's.
        image_folder: What relative paths of images and videos start from; None takes that of the data file.
        allow_remote_images: Whether http(s) images are fetched.
        max_image_pixels: Most pixels an image may have; 0 for no limit.
        exif_orientation: ``auto`` as the generation's inference does, ``apply`` or ``ignore``.
        literal_control_tokens: Whether control texts, such as ``<|im_end|>``, are plain text.
        audio_prompt: ``chat`` or ``plain`` for MiniCPM-o; None: ``chat``.
        enable_thinking: Whether the model thinks first; None: as it does by itself.
        allow_other_base: Whether the adapter may go on a model it was not trained on.
    """

    model_name_or_path: str | None = None
    adapter: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    load_4bit: bool = False
    attn_implementation: str = "sdpa"
    cache_dir: str | None = None
    max_slice_nums: int | None = None
    video_fps: float | None = None
    max_num_frames: int | None = None
    downsample_mode: str | None = None
    video_sound: bool = False
    stack_frames: int | None = None
    image_folder: str | None = None
    allow_remote_images: bool = False
    max_image_pixels: int = DEFAULT_MAX_PIXELS
    exif_orientation: str = "auto"
    literal_control_tokens: bool = False
    audio_prompt: str | None = None
    enable_thinking: bool | None = None
    allow_other_base: bool = False

    def data_arguments(self, adapter: AdapterFolder | None) -> DataArguments:
        """How images and videos are opened and cut."""
        names = {one.name for one in fields(self)} & {one.name for one in fields(DataArguments)}
        given = {name: getattr(self, name) for name in names - {"enable_thinking"}}
        if self.downsample_mode is None and adapter is not None:
            given["downsample_mode"] = adapter.downsample_mode
        return DataArguments.of_checkpoint(**given)

    @classmethod
    def of(cls, values: Namespace) -> ModelChoice:
        """Read the choice off parsed flags."""
        return cls(**{name: getattr(values, name) for name in cls.__dataclass_fields__})


def resolve_base(
    model_name_or_path: str | None, adapter: str | None, *, cache_dir: str | None = None
) -> tuple[Path, AdapterFolder | None]:
    """Find the base model's folder and the adapter's.

    Raises:
        InferenceError: When neither is given, or the adapter does not name its base.
    """
    if adapter is None and model_name_or_path is not None:
        if (Path(model_name_or_path).expanduser() / "adapter_config.json").is_file():
            model_name_or_path, adapter = None, model_name_or_path
    found = None if adapter is None else read_adapter_folder(adapter)
    name = model_name_or_path or (found.base_name if found else "")
    if not name:
        raise InferenceError(
            "no model is given, expected --model_name_or_path, or an --adapter that names its base. Add one of them."
        )
    return resolve_model_folder(name, cache_dir=cache_dir), found


class FoundModel(NamedTuple):
    """A model's files, examined but not loaded: the base model's folder, the adapter, the ``Processing``."""

    folder: Path
    adapter: AdapterFolder | None
    processing: Processing


def find_model(choice: ModelChoice) -> FoundModel:
    """Find a model's files, and check that they belong together.

    Raises:
        InferenceError: When no model is named, or ``enable_thinking`` is set for one without a thinking mode.
        AdapterError: When the adapter belongs to another model.
    """
    folder, adapter = resolve_base(choice.model_name_or_path, choice.adapter, cache_dir=choice.cache_dir)
    new_tokens = adapter.new_tokens if adapter else ()
    processing = load_processing(folder, choice.data_arguments(adapter), new_tokens=new_tokens)
    if choice.enable_thinking and not processing.generation.thinking:
        raise InferenceError(
            f"--enable_thinking: {processing.generation.title} has no thinking mode, expected V-4.5 or later. Leave "
            "it out."
        )
    if adapter is not None:
        check_base(adapter, folder, processing.generation, allow_other_base=choice.allow_other_base)
    return FoundModel(folder, adapter, processing)


def load_for_inference(choice: ModelChoice, found: FoundModel | None = None) -> tuple[Any, Processing]:
    """Load a model, with its adapter, ready to answer.

    Args:
        choice: Which model, and how it is loaded.
        found: Its files, when ``find_model`` has found them already.

    Returns:
        The model in eval mode on its device, and the checkpoint's ``Processing``.

    Raises:
        InferenceError: When there is no such device.
        AdapterError: When the adapter does not fit.
    """
    folder, adapter, processing = found or find_model(choice)
    device = choose_device(choice.device)
    model: Any = load_model(
        folder,
        dtype=choose_dtype(choice.dtype, folder, device),
        attention=choice.attn_implementation,
        quant_bits=4 if choice.load_4bit else None,
        downsample_mode=processing.media.downsample_mode,
        # Straight to the GPU: quantized layers can't all move later, and RAM need not hold the model.
        device_map={"": device} if device.type == "cuda" else None,
    )
    add_token_rows(model, processing.new_tokens)
    if adapter is not None:
        # peft takes seconds that most calls need not wait for.
        from minicpm_tune.lora.loading import load_adapter

        model = load_adapter(model, adapter)
        logger.info("Adapter: %s", adapter.path)
    dtype = str(model.dtype).removeprefix("torch.")
    logger.info("%s on %s in %s", processing.generation.title, device, dtype)
    return model.eval(), processing


def choose_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is this process's GPU, or the CPU where there is none.

    Raises:
        InferenceError: When there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InferenceError(
            f"--device {name}: no such device, expected auto, cpu, cuda or cuda:N. Choose one of them."
        ) from error
    if device.type == "cuda":
        index = local_rank() if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise InferenceError(
                f"--device {name}: found {torch.cuda.device_count()} GPUs, expected at least {index + 1}. Use --device "
                "cpu, or a lower number."
            )
        device = torch.device("cuda", index)
    return device


def choose_dtype(name: str, folder: Path, device: torch.device) -> torch.dtype:
    """The precision of that name; ``auto`` is what suits the device and the size of the checkpoint."""
    if name != "auto":
        return DTYPE_NAMES[name]
    stored = stored_dtype(folder)
    if stored == torch.float32:
        return stored
    if device.type == "cuda":
        return DTYPE_NAMES[best_precision()]
    size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    return torch.float32 if size < _SMALL_CHECKPOINT else torch.bfloat16

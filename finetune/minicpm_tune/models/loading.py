"""From a folder or a hub id to a model with its weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, PreTrainedModel

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.checkpoints.weight_files import WeightFileError, weight_files
from minicpm_tune.errors import UserError
from minicpm_tune.models.quantization import finish_loading, loading_arguments, loading_quantization
from minicpm_tune.safe_loading import reading

logger = logging.getLogger(__name__)

# What a training or an export can need of a hub repository; pictures and other formats stay there.
_HUB_PATTERNS = ("*.json", "*.py", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_HUB_WEIGHTS = ("*.safetensors", "*.bin")


class ModelPathError(UserError):
    """A --model_name_or_path that leads to no checkpoint."""


def resolve_model_folder(name_or_path: str, *, cache_dir: str | None = None, weights: bool = True) -> Path:
    """Give the folder of a checkpoint, downloading it first when it is a hub id.

    Downloads follow huggingface_hub's own settings (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN).
    Of several weight formats only safetensors are fetched, where the repository has them.

    Args:
        name_or_path: A folder, or ``owner/name`` on the hub.
        cache_dir: Where downloads go; huggingface_hub's default when None.
        weights: False fetches the configuration and tokenizer files alone.

    Raises:
        ModelPathError: When it is neither; the message says which of the two was tried.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelPathError(
                f"--model_name_or_path {name_or_path}: the folder has no config.json. Expected a MiniCPM-V checkpoint."
            )
        return folder.resolve()
    if folder.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") != 1:
        raise ModelPathError(
            f"--model_name_or_path {name_or_path}: no such folder. Give a checkpoint's folder, or a hub id "
            "like openbmb/MiniCPM-V-2_6."
        )
    return _download(name_or_path, cache_dir=cache_dir, weights=weights)


def _download(hub_id: str, *, cache_dir: str | None, weights: bool) -> Path:
    try:
        folder = Path(snapshot_download(hub_id, cache_dir=cache_dir, allow_patterns=list(_HUB_PATTERNS)))
        if weights:
            has_safetensors = (folder / "model.safetensors.index.json").is_file() or not (
                folder / "pytorch_model.bin.index.json"
            ).is_file()
            patterns = [*_HUB_PATTERNS, _HUB_WEIGHTS[0] if has_safetensors else _HUB_WEIGHTS[1]]
            folder = Path(snapshot_download(hub_id, cache_dir=cache_dir, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ModelPathError(
            f"--model_name_or_path {hub_id}: no such folder here, and the hub did not give it ({error}). Check the "
            "name; without a network, download the checkpoint elsewhere and give its folder."
        ) from error
    return folder


def load_model(
    folder: Path,
    generation: Generation,
    *,
    dtype: torch.dtype,
    attention: str = "sdpa",
    quant_bits: int | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load the weights of a checkpoint into the class of its generation.

    Weights that the files hold in 4 or 8 bit stay so.

    Args:
        folder: The checkpoint.
        generation: Its generation.
        dtype: What the weights are cast to while loading.
        attention: transformers' ``attn_implementation`` for the LLM.
        quant_bits: 4 or 8: the LLM's linear layers are quantised while loading. They compute in ``dtype``.
        **kwargs: Handed to ``from_pretrained`` (``device_map``).

    Raises:
        WeightFileError: When weight files are missing or lack parameters of the model.
        QuantizationError: When they are quantised in a way that does not fit.
    """
    weight_files(folder)
    quantization = loading_quantization(folder, generation, bits=quant_bits, compute_dtype=dtype)
    kwargs |= {"dtype": dtype, "attn_implementation": attention, "output_loading_info": True}
    kind, config = class_and_config(folder, generation)
    kwargs |= loading_arguments(quantization, config)
    with reading(folder):
        model, report = kind.from_pretrained(folder, config=config, **kwargs)
    missing = sorted(report["missing_keys"])
    if missing:
        raise WeightFileError(
            f"{folder}: the weights lack {len(missing)} of the model's parameters, the first is {missing[0]}. Expected "
            f"a complete {generation.title} checkpoint; an adapter folder goes to --lora_weight_path."
        )
    if quantization is not None:
        finish_loading(model, generation, dtype)
    return model


def class_and_config(folder: Path, generation: Generation) -> tuple[Any, Any]:
    """Give the model class of a generation, and the configuration of a folder for it.

    Classes are imported when they are asked for: each family brings its own part of transformers.

    Args:
        folder: The checkpoint.
        generation: Its generation.
    """
    if generation.native:
        from minicpm_tune.models.minicpmv46.modeling import native_class

        return native_class(generation), AutoConfig.from_pretrained(folder)
    if generation.family == "xcomposer2":
        from minicpm_tune.models.xcomposer2.configuration import XComposer2Config
        from minicpm_tune.models.xcomposer2.modeling import XComposer2

        return XComposer2, XComposer2Config.from_folder(folder)
    from minicpm_tune.models.minicpmv.configuration import MiniCPMVConfig
    from minicpm_tune.models.minicpmv.modeling import MiniCPMV

    return MiniCPMV, MiniCPMVConfig.from_folder(folder)

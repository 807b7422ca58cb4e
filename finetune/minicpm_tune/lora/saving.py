"""Completing saved adapters, so that other tools load them.

Beside the weights go the base model's fingerprint, and its tokenizer and processor files: the official
trainer puts them there, and code after its guides looks for them there.

adapter_config.json lists every setting of the peft that wrote it, and an older peft refuses settings it does
not know. The released code needs transformers 4.40 to 4.48, and so peft 0.10 to 0.13. Therefore unknown
settings are removed where they hold their default.

PiSSA and OLoRA start from the weights: they take a part A0 B0 out of each weight and train it, W = W' + s B A
with B A = B0 A0 at first. Loaded on the original W the trained A, B alone would be wrong; what was learned
is B A - B0 A0, which is itself an adapter of twice the rank. PEFT's own conversion (0.21) drops
modules_to_save.

Source: "PiSSA: Principal Singular Values and Singular Vectors Adaptation" (arXiv:2404.02948), appendix.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.checkpoints.released_format import set_downsample_mode
from minicpm_tune.checkpoints.vocabulary import write_added_tokens
from minicpm_tune.checkpoints.weight_files import copy_tokenizer_files
from minicpm_tune.files import give_umask_mode
from minicpm_tune.lora.adapter_folders import CONFIG_FILE, WEIGHT_FILES
from minicpm_tune.lora.base_fingerprint import fingerprint_of, write_fingerprint

# Settings of a LoRA adapter in peft 0.10.0.
_SETTINGS_OF_PEFT_0_10 = frozenset(
    (
        "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r",
        "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save",
        "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
        "megatron_config", "megatron_core", "loftq_config", "use_dora", "layer_replication",
    )
)  # fmt: skip


def complete_adapter_folder(
    folder: Path,
    *,
    base: Path,
    generation: Generation,
    quant_bits: int | None = None,
    downsample_mode: str | None = None,
    new_tokens: dict[str, int] | None = None,
) -> None:
    """Make a freshly saved adapter loadable by others, and identify its base model.

    Args:
        folder: What PEFT saved.
        base: The base model's folder.
        generation: The base model's generation.
        quant_bits: How the base was held in training; None for full precision.
        downsample_mode: That of the training (4.6 and 4.7); the adapter is then used in the same mode.
        new_tokens: Token -> id of those that the training added; the adapter's tokenizer has them.
    """
    held = None if quant_bits is None else f"{quant_bits} bit"
    fingerprint = fingerprint_of(base, generation, quantization=held)
    write_fingerprint(
        folder, replace(fingerprint, downsample_mode=downsample_mode, new_tokens=new_tokens or {})
    )
    copy_tokenizer_files(base, folder)
    write_added_tokens(folder, new_tokens or {})
    if downsample_mode is not None:
        set_downsample_mode(folder, downsample_mode)
    _edit_config(folder, _remove_unneeded_settings)


def _remove_unneeded_settings(config: dict[str, Any]) -> dict[str, Any]:
    defaults = LoraConfig().to_dict()
    return {
        key: value
        for key, value in config.items()
        if key in _SETTINGS_OF_PEFT_0_10 or (key != "peft_version" and value != defaults.get(key))
    }


def _edit_config(folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / CONFIG_FILE
    config = edit(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def fit_to_original_base(model: Any, folder: Path) -> None:
    """Convert a saved adapter that started from the weights; leave any other as it is.

    Args:
        model: The model that was trained; ``build.add_adapter`` remembered how its adapter started.
        folder: Where the adapter was saved.
    """
    initial = getattr(model, "initial_lora", None)
    if initial is None:
        return
    weights = load_file(folder / WEIGHT_FILES[0])
    for key, start in initial.items():
        trained, start = weights[key], start.to(weights[key].dtype)
        if ".lora_A." in key:
            weights[key] = torch.cat([trained, start], dim=0)
        elif ".lora_B." in key:
            weights[key] = torch.cat([trained, -start], dim=1).contiguous()
    save_file(weights, folder / WEIGHT_FILES[0], metadata={"format": "pt"})
    give_umask_mode(folder)
    _edit_config(folder, _double_rank)


def _double_rank(config: dict[str, Any]) -> dict[str, Any]:
    """Double the rank at the same scale, which is alpha / r, or with rsLoRA alpha / sqrt(r)."""
    factor = 2**0.5 if config.get("use_rslora") else 2
    return config | {
        "lora_alpha": config["lora_alpha"] * factor,
        "r": 2 * config["r"],
        "init_lora_weights": True,
    }

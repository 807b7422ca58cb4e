"""Completing saved adapters, so that other tools load them; llama.cpp's converter too.

Beside the weights go the base model's fingerprint, and its tokenizer and processor files: the official
trainer puts them there, and code after its guides looks for them there.

adapter_config.json lists every setting of the peft that wrote it, and an older peft refuses settings it does
not know. The released code needs transformers 4.40 to 4.48, and so peft 0.10 to 0.13. Therefore unknown
settings are removed where they hold their default.

PiSSA and OLoRA start from the weights: they take a part A0 B0 out of each weight and train it, W = W' + s B A
with B A = B0 A0 at first. Loaded on the original W the trained A, B alone would be wrong; what was learned
is B A - B0 A0, which is itself an adapter of twice the rank. PEFT's own conversion (0.21) drops
modules_to_save.

llama.cpp converts adapters of the LLM as a model by itself: ``base_model.model.model.layers...``, where an adapter of
MiniCPM-V has ``base_model.model.llm.model.layers...``. It scales them by alpha / r, whatever the adapter's
settings say.

Sources: "PiSSA: Principal Singular Values and Singular Vectors Adaptation" (arXiv:2404.02948), appendix;
convert_lora_to_gguf.py of llama.cpp (2026), ``get_base_tensor_name`` and ``LoraModel``.
"""

from __future__ import annotations

import json
import re
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
from minicpm_tune.checkpoints.weight_files import copy_tokenizer_files, tensors_in_file
from minicpm_tune.files import give_umask_mode
from minicpm_tune.lora.adapter_folders import (
    CONFIG_FILE,
    WEIGHT_FILES,
    AdapterError,
    AdapterFolder,
    fingerprint_of,
    write_fingerprint,
)

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


_WRAPPED = "base_model.model."
_LORA_WEIGHT = re.compile(r".*\.lora_[AB]\.weight")


def check_convertible(adapter: AdapterFolder, generation: Generation) -> None:
    """Refuse an adapter that is more than LoRA weights of the LLM.

    Raises:
        AdapterError: With what it holds, and what to do instead.
    """
    llm = f"{_WRAPPED}{generation.modules['llm'][0]}."
    names = [tensor.name for tensor in tensors_in_file(adapter.weights)]
    others = sorted(name for name in names if not (name.startswith(llm) and _LORA_WEIGHT.fullmatch(name)))
    found = None
    if adapter.config.get("layer_replication"):
        found = "an adapter on replicated layers"
    elif adapter.config.get("target_parameters"):
        found = "an adapter of experts"
    elif adapter.is_legacy:
        found = "vision tower, resampler and embeddings in a file of their own"
    elif others:
        found = f"{len(others)} tensors besides LoRA weights of the LLM (the first is {others[0]})"
    if found:
        raise AdapterError(
            f"{adapter.path}: found {found}, expected a plain LoRA adapter of the LLM, as llama.cpp does. Merge it "
            "into its base, or train one with --lora_modules_to_save none and without DoRA and biases."
        )


def write_gguf_names(adapter: AdapterFolder, generation: Generation, folder: Path) -> None:
    """Write a copy of a plain adapter for convert_lora_to_gguf.py; see ``check_convertible``.

    Args:
        adapter: The adapter.
        generation: Its base model's generation.
        folder: Where the copy goes; it must exist.
    """
    llm = generation.modules["llm"][0]
    tensors = {_renamed(tensor.name, llm): tensor.read() for tensor in tensors_in_file(adapter.weights)}
    save_file(tensors, folder / WEIGHT_FILES[0], metadata={"format": "pt"})
    config = dict(adapter.config)
    if config.pop("use_rslora", False):
        config["lora_alpha"] *= config["r"] ** 0.5
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _renamed(name: str, llm: str) -> str:
    """A tensor's name in the LLM as a model by itself.

    Example:
        >>> _renamed("base_model.model.llm.model.layers.0.mlp.up_proj.lora_A.weight", "llm")
        'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight'
        >>> _renamed("base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.weight", "model.language_model")
        'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight'
    """
    inner = name.removeprefix(f"{_WRAPPED}{llm}.")
    return _WRAPPED + (inner if inner.startswith(("model.", "lm_head.")) else f"model.{inner}")

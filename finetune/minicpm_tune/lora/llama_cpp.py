"""Adapters for llama.cpp: the tensor names and settings that its convert_lora_to_gguf.py understands.

It converts adapters of the LLM as a model by itself: ``base_model.model.model.layers...``, where an adapter of
MiniCPM-V has ``base_model.model.llm.model.layers...``. It scales them by alpha / r, whatever the adapter's
settings say.

Source: convert_lora_to_gguf.py of llama.cpp (2026), ``get_base_tensor_name`` and ``LoraModel``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors.torch import save_file

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.checkpoints.weight_files import tensors_in_file
from minicpm_tune.lora.adapter_folders import CONFIG_FILE, WEIGHT_FILES, AdapterError, AdapterFolder

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

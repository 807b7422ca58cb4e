"""What a saved adapter needs so that others can load it: its base's fingerprint, and weights that fit the base.

PiSSA and OLoRA start from the weights: they take a part A0 B0 out of each weight and train it, W = W' + s B A
with B A = B0 A0 at first. Loaded on the original W the trained A, B alone would be wrong; what was learned
is B A - B0 A0, which is itself an adapter of twice the rank. PEFT's own conversion (0.21) drops
modules_to_save.

Source: "PiSSA: Principal Singular Values and Singular Vectors Adaptation" (arXiv:2404.02948), appendix.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.lora.adapter_folders import CONFIG_FILE, WEIGHT_FILES
from minicpm_tune.lora.base_fingerprint import fingerprint_of, write_fingerprint


def complete_adapter_folder(
    folder: Path, *, base: Path, generation: Generation, quant_bits: int | None = None
) -> None:
    """Add to a freshly saved adapter what identifies its base model.

    Args:
        folder: What PEFT saved.
        base: The base model's folder.
        generation: The base model's generation.
        quant_bits: How the base was held in training; None for full precision.
    """
    held = None if quant_bits is None else f"{quant_bits} bit"
    write_fingerprint(folder, fingerprint_of(base, generation, quantization=held))


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
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8"))
    # Twice the rank at the same scale: alpha / r, or with rsLoRA alpha / sqrt(r).
    config["lora_alpha"] *= 2**0.5 if config.get("use_rslora") else 2
    config |= {"r": 2 * config["r"], "init_lora_weights": True}
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")

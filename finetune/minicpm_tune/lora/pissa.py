"""Adapters that start from the weights (PiSSA, OLoRA), saved so that they fit the unchanged base.

Such a start takes a part A0 B0 out of each weight and trains it: W = W' + s B A, with B A = B0 A0 at
first. Loaded on the original W the trained A, B alone would be wrong; what was learned is B A - B0 A0,
which is itself an adapter of twice the rank. PEFT's own conversion (0.21) drops modules_to_save.

Source: "PiSSA: Principal Singular Values and Singular Vectors Adaptation" (arXiv:2404.02948), appendix.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

STARTS_FROM_WEIGHTS = ("pissa", "olora")


def remember_start(model: PeftModel) -> None:
    """Keep a copy of the adapter as it starts, where its start changed the base weights."""
    config: Any = model.peft_config["default"]
    if str(config.init_lora_weights).startswith(STARTS_FROM_WEIGHTS):
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        start = {key: value.detach().cpu().clone() for key, value in state.items() if ".lora_" in key}
        wrapped: Any = model
        wrapped.initial_lora = start


def convert_saved_adapter(folder: Path, initial: dict[str, Tensor]) -> None:
    """Turn a saved adapter into one of twice the rank that fits the unchanged base.

    Args:
        folder: Where ``adapter_model.safetensors`` and ``adapter_config.json`` were saved.
        initial: The adapter as it started.
    """
    weights = load_file(folder / "adapter_model.safetensors")
    for key, start in initial.items():
        trained, start = weights[key], start.to(weights[key].dtype)
        if ".lora_A." in key:
            weights[key] = torch.cat([trained, start], dim=0)
        elif ".lora_B." in key:
            weights[key] = torch.cat([trained, -start], dim=1).contiguous()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # The scale alpha / r (with rsLoRA alpha / sqrt(r)) stays what it was in training.
    config["lora_alpha"] *= 2**0.5 if config.get("use_rslora") else 2
    config |= {"r": 2 * config["r"], "init_lora_weights": True}
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")

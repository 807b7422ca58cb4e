"""What is computed and kept in 16 bit under autocast, where the weights that train are held in fp32.

Autocast rounds the inputs of every matrix product by itself. What stands between the products follows its widest
input: behind fp32 embeddings the sums that run through all layers are fp32, behind fp32 norms every projection rounds
the same tensor once more, and all of it is kept for the backward. DeepSpeed has no fp32 weights in the model, so there
the same things are 16 bit. ``hold_activations_in_16_bit`` makes them 16 bit under autocast too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on a device; None where it is off."""
    # The meta device, where plan_memory.py runs a step, has no autocast.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def to_autocast_dtype(hidden: Tensor) -> Tensor:
    """Round as the next matrix product does under autocast; what is kept or cached is then half as large."""
    dtype = autocast_dtype(hidden.device)
    return hidden if dtype is None else hidden.to(dtype)


class RoundedLayerNorm(nn.LayerNorm):
    """A LayerNorm that takes and gives 16 bit under autocast, and computes in fp32 in between.

    Left to itself autocast gives it an fp32 copy of its input, which is kept, and an fp32 output.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        dtype = autocast_dtype(hidden.device)
        if dtype is None:
            return super().forward(hidden)
        weight, bias = (None if part is None else part.to(dtype) for part in (self.weight, self.bias))
        with torch.autocast(hidden.device.type, enabled=False):
            return F.layer_norm(hidden.to(dtype), self.normalized_shape, weight, bias, self.eps)


def hold_activations_in_16_bit(model: Any, *, residual: bool = True) -> None:
    """Make what passes between layers 16 bit under autocast; without autocast nothing changes.

    Args:
        model: A model of this project, with or without an adapter.
        residual: Whether this includes the sums that run through all layers, and the norms' outputs.
            ``--fp32_residual_connection true`` keeps them as autocast makes them.
    """
    blocks = model._no_split_modules
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.register_forward_pre_hook(_leave_lora_input)
        elif not residual:
            continue
        elif type(module).__name__ in blocks:
            module.register_forward_pre_hook(_round_input)
        elif type(module) is nn.LayerNorm:
            module.__class__ = RoundedLayerNorm
        elif type(module).__name__.endswith("RMSNorm"):
            module.register_forward_hook(_round_output)


def _leave_lora_input(layer: Any, inputs: tuple[Any, ...]) -> None:
    """PEFT casts a LoRA layer's input to the adapter's fp32, and autocast casts it back at once (0.21)."""
    layer.cast_input_dtype_enabled = autocast_dtype(inputs[0].device) is None


def _round_input(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden, *rest = inputs
    return (to_autocast_dtype(hidden), *rest)


def _round_output(norm: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return to_autocast_dtype(output)

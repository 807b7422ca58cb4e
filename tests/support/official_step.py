"""The step of the official finetune.py, as far as its memory differs from this project's.

The only published measurements of memory are of that script; the plan's arithmetic is checked against them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minicpm_tune.planning.step_memory import Attention, fused_attention


def official_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    """Logits of every position, in fp32, and the cross entropy of all of them at once."""
    base = getattr(model, "get_base_model", lambda: model)()
    inputs = dict(batch)
    labels = inputs.pop("labels")
    logits = base(**inputs).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def official_attention(model: nn.Module) -> Attention:
    """The released vision tower materializes its attention scores, with the softmax in fp32; the LLM's is fused."""
    vision = next(module for name, module in model.named_modules() if name.endswith("vpm"))
    widths = {module.head_dim for module in vision.modules() if hasattr(module, "head_dim")}

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if query.shape[-1] not in widths:
            return fused_attention(query, key, value, **options)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value

    return attend

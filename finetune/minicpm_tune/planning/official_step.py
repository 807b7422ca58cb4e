"""The step of the official finetune.py, as far as its memory differs from this project's.

Only ``plan_memory.py`` runs it, on the meta device: to check its arithmetic against the only published
measurements, which are of that script.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from minicpm_tune.planning.step_memory import eager_attention, fused_attention


def official_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    """Logits of every position, in fp32, and the cross entropy of all of them at once."""
    base = getattr(model, "get_base_model", lambda: model)()
    inputs = dict(batch)
    labels = inputs.pop("labels")
    hidden = base._run_llm(base.embed(**inputs), None, inputs.get("position_ids"))
    logits = base.llm.lm_head(hidden).float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def official_attention(model: nn.Module) -> Callable[..., Tensor]:
    """The released vision tower writes its attention out; the LLM's is fused."""
    vision = next(module for name, module in model.named_modules() if name.endswith("vpm"))
    widths = {module.head_dim for module in vision.modules() if hasattr(module, "head_dim")}

    def attend(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        written_out = query.shape[-1] in widths
        return (eager_attention if written_out else fused_attention)(query, key, value, **kwargs)

    return attend

"""Learning rates of their own for parts of the model, and for the B matrices of LoRA (LoRA+)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.errors import UserError
from minicpm_tune.models.parameter_parts import PartCount
from minicpm_tune.settings.argument_groups import LearningRates


class LearningRateError(UserError):
    """A learning rate that would have no effect."""


def check_rates(rates: LearningRates, counts: dict[str, PartCount]) -> None:
    """Refuse a learning rate for a part that doesn't train: with adapters that depends on what they save.

    Args:
        rates: The rates that were asked for.
        counts: What trains, from ``parts.count_parts``.

    Raises:
        LearningRateError: With the flag that would have no effect.
    """
    flags = {
        "vision": "vision_lr",
        "audio": "audio_lr",
        "resampler": "resampler_lr",
        "llm": "llm_lr",
        "embeddings": "embed_lr",
    }
    for part, flag in flags.items():
        if rates.parts.get(part) is not None and not (part in counts and counts[part].trainable):
            raise LearningRateError(
                f"--{flag} is given, but nothing of that part trains. Leave it out, or let the part train "
                "(--lora_modules_to_save with adapters)."
            )


def split_by_rate(
    optimizer: torch.optim.Optimizer, model: nn.Module, generation: Generation, rates: LearningRates
) -> None:
    """Split an optimizer's groups so that all parameters of a group have one rate.

    Call before the scheduler is made, which takes each group's rate as the one to scale.
    """
    rate_of = {
        id(value): rates.of(name, generation.part_of(name)) for name, value in model.named_parameters()
    }
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        by_rate: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_rate.setdefault(rate_of[id(parameter)], []).append(parameter)
        groups += [{**group, "params": params, "lr": rate} for rate, params in by_rate.items()]
    optimizer.param_groups[:] = groups

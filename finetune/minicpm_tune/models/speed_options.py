"""Flags that trade memory against time: checkpointing per part, liger kernels."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from transformers import PreTrainedModel

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.errors import UserError
from minicpm_tune.settings.arguments import TrainingArguments

logger = logging.getLogger(__name__)


class SpeedOptionError(UserError):
    """A flag that has no effect on this machine or model."""


def set_checkpointing(model: PreTrainedModel, generation: Generation, training: TrainingArguments) -> None:
    """Turn on activation checkpointing, part by part.

    ``--activation_checkpointing`` covers the whole model; ``--vision_gradient_checkpointing`` overrides it for
    the vision tower and the resampler. Checkpointing is never reentrant, because that drops the gradients of layers
    whose inputs need none.

    Args:
        model: A model without adapters.
        generation: Its generation.
        training: The arguments. They are changed so that Trainer does not turn checkpointing on again.
    """
    llm = bool(training.gradient_checkpointing)
    vision = llm if training.vision_gradient_checkpointing is None else training.vision_gradient_checkpointing
    if llm or vision:
        options = {"use_reentrant": False, **(training.activation_checkpointing_kwargs or {})}
        # Which layers, and where their inputs are held; the rest is for torch's checkpoint function.
        which = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
        model.activation_checkpointing_enable(options, **which)
        seen = (*generation.modules["vision"], *generation.modules["resampler"])
        for name, module in model.named_modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing &= vision if name.startswith(seen) else llm
    training.gradient_checkpointing = training.activation_checkpointing = False


def apply_liger(model: PreTrainedModel, training: TrainingArguments) -> None:
    """Replace RMSNorm, rotary embedding and SwiGLU of the LLM by liger's kernels, with ``--use_liger_kernel true``.

    Its fused loss is not used: ``loss.LMHead`` makes logits of supervised tokens alone, chunk by chunk.

    Raises:
        SpeedOptionError: Without a GPU, without the package, or for an LLM it has no kernels for.
    """
    if not training.use_liger_kernel:
        return
    if not torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None:
        raise SpeedOptionError(
            "--use_liger_kernel true: needs a GPU and the liger-kernel package. Run pip install liger-kernel, or leave "
            "the flag out."
        )
    # Not installed everywhere, and it takes seconds.
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    llm: Any = getattr(model, "llm", model)
    kind = llm.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise SpeedOptionError(
            f"--use_liger_kernel true: the installed liger-kernel has no kernels for {kind} models. Leave the flag out."
        )
    _apply_liger_kernel_to_instance(model=llm, fused_linear_cross_entropy=False, cross_entropy=False)
    training.use_liger_kernel = False  # Trainer would look for kernels for the whole model, and find none
    logger.info("liger kernels replace RMSNorm, rotary embedding and MLP of the %s LLM", kind)

"""Memory against time: checkpointing per part, and kernels that packages bring."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.errors import UserError
from minicpm_tune.settings.arguments import TrainingArguments

logger = logging.getLogger(__name__)

# LLMs, by transformers' name, whose losses and gradients with liger's kernels a test compares.
LIGER_MODELS = ("granite", "llama", "qwen2", "qwen3", "qwen3_5_text")


class SpeedOptionError(UserError):
    """A flag that has no effect on this machine or model."""


@dataclass(frozen=True)
class Checkpointing:
    """Which layers are computed again in the backward instead of being kept: every so many; 0 is none.

    Attributes:
        llm: Of the language model.
        vision: Of the vision tower, and of the audio encoder where there is one.
    """

    llm: int = 0
    vision: int = 0

    @classmethod
    def asked_for(cls, training: TrainingArguments) -> Checkpointing:
        """What the flags say; ``--vision_gradient_checkpointing`` overrides the other for the tower."""
        every = (training.activation_checkpointing_kwargs or {}).get("every_n_layers", 1)
        llm = bool(training.gradient_checkpointing)
        vision = training.vision_gradient_checkpointing
        return cls(every * llm, every * (llm if vision is None else vision))

    def __str__(self) -> str:
        names = {0: "none", 1: "every layer", 2: "every second layer"}
        llm, vision = (names.get(every, f"every {every}th layer") for every in (self.llm, self.vision))
        return llm if llm == vision else f"{llm} of the language model, {vision} of the vision tower"


def set_checkpointing(
    model: PreTrainedModel,
    generation: Generation,
    training: TrainingArguments,
    chosen: Checkpointing | None = None,
) -> None:
    """Turn on activation checkpointing, part by part.

    Args:
        model: A model without adapters.
        generation: Its generation.
        training: The arguments. They are changed so that Trainer does not turn checkpointing on again.
        chosen: What ``--activation_checkpointing auto`` came to; None: what the flags say.
    """
    checkpointing = Checkpointing.asked_for(training) if chosen is None else chosen
    options = {**(training.activation_checkpointing_kwargs or {})}
    options.pop("every_n_layers", None)
    enable_checkpointing(model, generation, checkpointing, **options)
    training.gradient_checkpointing = training.activation_checkpointing = False
    training.checkpoints_llm = checkpointing.llm > 0


def enable_checkpointing(
    model: Any, generation: Generation, checkpointing: Checkpointing, *, offload: bool = False, **options: Any
) -> None:
    """Turn on activation checkpointing in the chosen layers.

    It is never reentrant, because that drops the gradients of layers whose inputs need none.

    Args:
        model: A model without adapters.
        generation: Its generation.
        checkpointing: The layers.
        offload: Whether their inputs are held in RAM.
        **options: For torch's checkpoint function.
    """
    if not (checkpointing.llm or checkpointing.vision):
        return
    model.activation_checkpointing_enable({"use_reentrant": False, **options}, offload=offload)
    modules = generation.modules
    seen = (*modules["vision"], *modules.get("audio", ()), *modules["resampler"])
    for name, module in model.named_modules():
        if hasattr(module, "gradient_checkpointing"):
            every = checkpointing.vision if name.startswith(seen) else checkpointing.llm
            number = name.rpartition(".")[2]  # of a layer; V-2's tower has one switch for all of its layers
            module.gradient_checkpointing &= (
                every > 0 and int(number if number.isdecimal() else 0) % every == 0
            )


def use_fast_kernels(model: PreTrainedModel, training: TrainingArguments) -> None:
    """Let liger's kernels compute RMSNorm, rotary embedding and SwiGLU of the LLM, and log which kernels are used.

    They are used where the package and a GPU are there, unless ``--use_liger_kernel false``. Its fused loss is not:
    ``loss.LMHead`` makes logits of supervised tokens alone, chunk by chunk.

    Raises:
        SpeedOptionError: With ``--use_liger_kernel true``, where they can't be used.
    """
    wanted = training.use_liger_kernel
    training.use_liger_kernel = False  # Trainer would look for kernels for the whole model, and find none
    why_not = _why_no_liger(model)
    if wanted and why_not:
        raise SpeedOptionError(f"--use_liger_kernel true: {why_not}. Leave the flag out.")
    if torch.cuda.is_available():
        found = "off, as asked for" if wanted is False else why_not
        logger.info(
            "liger kernels: %s", found or "RMSNorm, rotary embedding and SwiGLU of the language model"
        )
        for name in {module.delta_kernel for module in model.modules() if hasattr(module, "delta_kernel")}:
            logger.info("delta rule: %s", name)
    if wanted is not False and not why_not:
        apply_liger(model)


def _why_no_liger(model: PreTrainedModel) -> str | None:
    """Why liger's kernels can't be used for a model on this machine; None when they can."""
    if not torch.cuda.is_available():
        return "needs a GPU"
    if importlib.util.find_spec("liger_kernel") is None:
        return "needs the package, pip install liger-kernel"
    kind = _language_model(model).config.model_type
    return None if kind in LIGER_MODELS else f"liger's kernels were not tried with {kind} models"


def _language_model(model: Any) -> Any:
    """The LLM, as the part of a model that has the layers."""
    found = model.llm if hasattr(model, "llm") else model.model
    return getattr(found, "language_model", found)


def apply_liger(model: PreTrainedModel) -> None:
    """Put liger's kernels into the LLM's modules, whose parameters stay where they are."""
    # Imported here: it imports triton, which only a GPU needs.
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    llm = _language_model(model)
    if hasattr(llm, "use_liger"):
        llm.use_liger()
    else:
        _apply_liger_kernel_to_instance(model=llm, fused_linear_cross_entropy=False, cross_entropy=False)

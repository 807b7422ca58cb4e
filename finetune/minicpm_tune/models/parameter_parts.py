"""The parts of a model (vision, resampler, embeddings, LLM, LoRA): what trains, and a table of it."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.errors import UserError

logger = logging.getLogger(__name__)

PARTS = ("vision", "audio", "resampler", "embeddings", "llm", "lora")
# Positions that never train, as released: V-2's queries, and those of the audio encoder. Loading forgets that. Within a
# module that an adapter trains in full they do train, as with the official script: PEFT (0.21) trains all of it, and
# under ZeRO-3 a frozen part of it would be missing when it is saved.
FIXED_TABLES = ("resampler.pos_embed", "apm.embed_positions.weight")


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part.

    Attributes:
        total: All of them, in numbers (not bytes); 4-bit weights count their real number.
        trainable: Those that train.
        dtypes: Storage dtypes, the most frequent first.
    """

    total: int
    trainable: int
    dtypes: tuple[str, ...]


def freeze(
    model: nn.Module, generation: Generation, *, vision: bool, resampler: bool, llm: bool, audio: bool = False
) -> None:
    """Let exactly the chosen parts train; embeddings go with the LLM.

    Args:
        model: A model without adapters.
        generation: Its generation.
        vision: Whether the vision tower trains.
        resampler: Whether the resampler (4.6 and 4.7: the merger) trains, and the projection of audio.
        llm: Whether the LLM trains, token embeddings and output layer included.
        audio: Whether the audio encoder trains.
    """
    trains = {"vision": vision, "audio": audio, "resampler": resampler, "embeddings": llm, "llm": llm}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = trains[generation.part_of(name)] and name not in FIXED_TABLES


def check_parts(generation: Generation, *, audio: bool, **_: bool) -> None:
    """Refuse to train a part that the generation does not have.

    Raises:
        UserError: With the flag to change.
    """
    if audio and generation.hearing is None:
        raise UserError(
            f"--tune_audio true: {generation.title} takes no audio, expected MiniCPM-o 2.6 or 4.5. Leave the flag out."
        )


def raise_precision_of_trained(model: nn.Module) -> None:
    """Hold trained parameters in fp32; autocast still computes in 16 bit.

    An update is about the size of a bf16 rounding step and would often be lost. Not needed with DeepSpeed, which
    keeps fp32 copies itself.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def count_parts(model: nn.Module, generation: Generation) -> dict[str, PartCount]:
    """Count the parameters of every part, in the order of ``PARTS``, parts without any left out."""
    trainable: Counter[str] = Counter()
    dtypes: dict[str, Counter[str]] = defaultdict(Counter)
    for name, parameter in model.named_parameters():
        if "original_module." in name:
            continue  # the untrained copy that an adapter keeps beside modules_to_save
        part, count = generation.part_of(name), parameter_count(parameter)
        trainable[part] += count if parameter.requires_grad else 0
        dtypes[part][str(parameter.dtype).removeprefix("torch.")] += count
    return {
        part: PartCount(dtypes[part].total(), trainable[part], tuple(dict(dtypes[part].most_common())))
        for part in PARTS
        if dtypes[part].total()
    }


def parameter_count(parameter: Any) -> int:
    """Numbers in a parameter, also when ZeRO-3 holds only a share here or 4-bit weights are packed."""
    if getattr(parameter, "quant_state", None) is not None:
        return parameter.quant_state.shape.numel()
    if hasattr(parameter, "ds_numel"):
        return parameter.ds_numel
    return parameter.numel()


def log_parts(counts: dict[str, PartCount], generation: Generation) -> None:
    """Log the table of parts, and the totals as the official script prints them."""
    total = sum(count.total for count in counts.values())
    trainable = sum(count.trainable for count in counts.values())
    logger.info("%s", parts_table(counts))
    logger.info("%s", {"Total": total, "Trainable": trainable})
    logger.info("llm_type=%s", generation.llm_types[0])


def parts_table(counts: dict[str, PartCount]) -> str:
    """The counts as a table for the log.

    Example:
        >>> print(parts_table({"llm": PartCount(2_000_000, 0, ("bfloat16",))}))
        part            parameters     trainable  stored as
        llm              2,000,000             0  bfloat16
    """
    lines = [f"{'part':<12}{'parameters':>14}{'trainable':>14}  stored as"]
    lines += [
        f"{part:<12}{count.total:>14,}{count.trainable:>14,}  {', '.join(count.dtypes)}"
        for part, count in counts.items()
    ]
    return "\n".join(lines)

"""Weights in 4 or 8 bit through bitsandbytes: the frozen language model of QLoRA.

Only the linear layers of the LLM's blocks are quantized. Vision tower, resampler, embeddings, output
layer and norms stay exact: they are a fifth of an 8B model's weights, most of them can train, and
an error in them reaches every token. A checkpoint whose files are quantized is loaded as stored.

Source: "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv:2305.14314): 4-bit NormalFloat with
double quantization; "LLM.int8()" (arXiv:2208.07339) for 8 bit.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.checkpoints.quantized_files import Quantization, QuantizationError, stored_quantization
from minicpm_tune.checkpoints.weight_files import tensor_names
from minicpm_tune.models.parameter_parts import count_parts

logger = logging.getLogger(__name__)

_MEBIBYTE = 2**20
_OTHER_OUTPUT = "output"  # the output layer's name where it isn't lm_head
# What transformers leaves on a model that it quantized.
_MARKS = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")


def loading_quantization(
    folder: Path, generation: Generation, *, bits: int | None, compute_dtype: torch.dtype
) -> Quantization | None:
    """Decide how a checkpoint's weights are held once loaded: as stored, or quantized as requested.

    Args:
        folder: The checkpoint.
        generation: Its generation.
        bits: 4 or 8; None: as stored.
        compute_dtype: What the run computes in.

    Returns:
        None for full precision.

    Raises:
        QuantizationError: When the files hold another method, or another number of bits.
    """
    stored = stored_quantization(folder, compute_dtype=compute_dtype)
    if stored is None:
        return None if bits is None else _new_quantization(folder, generation, bits, compute_dtype)
    if bits not in (None, stored.bits):
        raise QuantizationError(
            f"{folder}: found weights stored in {stored.bits} bit, expected {bits} bit or full precision. Give the "
            "full-precision checkpoint, which is quantized while it is loaded."
        )
    return stored


def _new_quantization(
    folder: Path, generation: Generation, bits: int, compute_dtype: torch.dtype
) -> Quantization:
    """Quantize the LLM's blocks. Everything else is listed as exact, by the released module names.

    The list includes o-2.6's speech parts, which are stored in the files and not run here.
    """
    modules = tuple(name for names in generation.modules.values() for name in names)
    exact = {name.partition(".")[0] for name in tensor_names(folder) if not name.startswith(modules)}
    exact |= {
        module for part in ("vision", "audio", "resampler") for module in generation.modules.get(part, ())
    }
    settings: dict[str, Any] = {"load_in_8bit": True}
    if bits == 4:
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": compute_dtype,
        }
    output = _OTHER_OUTPUT if _OTHER_OUTPUT in generation.modules["llm"] else "lm_head"
    skipped = [*sorted(exact), *generation.exact, output]
    return Quantization(bits, BitsAndBytesConfig(**settings, llm_int8_skip_modules=skipped))


def loading_arguments(quantization: Quantization | None, config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments for ``from_pretrained``; a stored quantization is put into ``config`` instead."""
    if quantization is None:
        return {}
    if quantization.modules:  # in the files
        config.quantization_config = quantization.settings.to_dict()
        return {}
    return {"quantization_config": quantization.settings}


def quantized_modules(model: nn.Module) -> dict[str, Any]:
    """Every layer whose weight is held in 4 or 8 bit, by its name."""
    return {name: module for name, module in model.named_modules() if _is_quantized(module)}


def _is_quantized(module: nn.Module) -> bool:
    # By name, because a run in full precision should not import bitsandbytes.
    kinds = [kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("bitsandbytes.")]
    return "Linear4bit" in kinds or "Linear8bitLt" in kinds


def finish_loading(model: PreTrainedModel, generation: Generation, dtype: torch.dtype) -> None:
    """Make a freshly loaded quantized model fit for training, and log the memory it takes.

    This replaces PEFT's ``prepare_model_for_kbit_training``, which holds every exact weight in fp32: 2.9 GiB more
    for MiniCPM-V 2.6, although norms compute in fp32 anyway and trained weights get fp32 masters elsewhere. Its
    gradients are no closer to those of an fp32 run (relative distance 0.117, without it 0.112; small V-2.6, bf16).
    It also makes inputs require gradients, which only reentrant checkpointing needs.

    Args:
        model: As ``from_pretrained`` gave it.
        generation: Its generation.
        dtype: What the weights would be held in without quantization.
    """
    for parameter in model.parameters():
        # transformers 5.23 leaves the exact weights beside stored quantized ones in the files' dtype.
        if parameter.is_floating_point() and getattr(parameter, "quant_state", None) is None:
            parameter.data = parameter.data.to(dtype)
    for module in quantized_modules(model).values():
        # On a CPU with AVX512_BF16 an evaluation repacks 4-bit weights for a kernel without a backward.
        # Later training steps then fail or get wrong gradients (bitsandbytes 0.50).
        module.support_avx512bf16_for_cpu = False
    logger.info("Quantized weights:\n%s", memory_table(model, generation, dtype))
    if is_deepspeed_zero3_enabled():
        logger.info(
            "ZeRO-3 with quantized weights: every process first loads the whole model (%.1f MiB), because "
            "bitsandbytes' layers can't be created in parts.",
            bytes_by_part(model, generation).total() / _MEBIBYTE,
        )


def bytes_by_part(model: nn.Module, generation: Generation) -> Counter[str]:
    """Bytes that each part's weights take, including the scales of quantized ones."""
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        tensors = [parameter, *_scales(parameter)]
        found[generation.part_of(name)] += sum(tensor.nbytes for tensor in tensors)
    for name, module in quantized_modules(model).items():
        # After its first forward, an 8-bit layer itself holds the scales.
        scales = getattr(getattr(module, "state", None), "SCB", None)
        found[generation.part_of(f"{name}.weight")] += 0 if scales is None else scales.nbytes
    return found


def _scales(parameter: Any) -> Iterator[Tensor]:
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield from (state.absmax, state.code)
        state = state.state2
    if getattr(parameter, "SCB", None) is not None:
        yield parameter.SCB


def memory_table(model: nn.Module, generation: Generation, dtype: torch.dtype) -> str:
    """The memory of each part's weights before and after quantization, as a table for the log."""
    after = bytes_by_part(model, generation)
    counts = count_parts(model, generation)
    rows = [(part, count.total * dtype.itemsize, after[part]) for part, count in counts.items()]
    rows.append(("total", sum(before for _, before, _ in rows), after.total()))
    lines = [f"{'part':<12}{'MiB before':>14}{'MiB after':>14}"]
    lines += [f"{part:<12}{old / _MEBIBYTE:>14,.1f}{new / _MEBIBYTE:>14,.1f}" for part, old, new in rows]
    return "\n".join(lines)


def dequantize(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Replace every quantized layer by an ordinary one that holds the dequantized values.

    These are the values that a QLoRA adapter was trained on. Call this before an adapter is added.

    Args:
        model: A quantized model without adapters; changed in place.
        dtype: What the values are held in.

    Returns:
        The model; it saves as one in full precision.
    """
    for name, module in quantized_modules(model).items():
        linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(_values(module).to(dtype), requires_grad=False)
        if module.bias is not None:
            linear.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
        model.set_submodule(name, linear.train(module.training))
    for module in model.modules():
        for mark in _MARKS:
            module.__dict__.pop(mark, None)
    model.config.__dict__.pop("quantization_config", None)
    # These conversions turned stored tensors into quantized ones; saving would reverse them.
    if "_weight_conversions" in model.__dict__:
        conversions: Any = model.__dict__["_weight_conversions"]
        model.__dict__["_weight_conversions"] = [each for each in conversions if not _deserializes(each)]
    return model


def _deserializes(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", [])
    return any(type(each).__module__.endswith("integrations.bitsandbytes") for each in operations)


def _values(module: Any) -> Tensor:
    import bitsandbytes  # takes seconds, and only quantized models need it

    weight = module.weight
    if hasattr(weight, "quant_state"):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    scales = weight.SCB if weight.SCB is not None else module.state.SCB
    return bitsandbytes.functional.int8_vectorwise_dequant(weight.data, scales)

"""Model folders whose files hold quantized weights: what they hold, and what can be trained on them."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
from transformers import BitsAndBytesConfig

from minicpm_tune.checkpoints.model_folder import read_config
from minicpm_tune.checkpoints.model_generations import Generation, TunedParts
from minicpm_tune.checkpoints.weight_files import tensor_names
from minicpm_tune.errors import UserError

BITSANDBYTES = "bitsandbytes"
# Names of the scales that bitsandbytes stores beside a 4-bit and an 8-bit weight.
_SCALES = (".weight.absmax", ".SCB")


class QuantizationError(UserError):
    """A quantized model that can't be used as asked."""


@dataclass(frozen=True)
class Quantization:
    """How a model's weights are quantized, in its files or while loading.

    Attributes:
        bits: 4 or 8.
        settings: The settings of bitsandbytes.
        modules: Names of the modules that are quantized in the files; empty for a model in full precision,
            which is quantized while loading.
    """

    bits: int
    settings: BitsAndBytesConfig
    modules: frozenset[str] = frozenset()


def stored_quantization(folder: Path, *, compute_dtype: torch.dtype = torch.float32) -> Quantization | None:
    """Read how a model's weights are quantized in its files; None for full precision.

    config.json names the method and its settings. Which modules are quantized is read off the tensors
    themselves, because ``llm_int8_skip_modules`` may be missing, or mean other modules in another
    version of transformers.

    Args:
        folder: The model folder.
        compute_dtype: The run's precision, which replaces the stored one.

    Raises:
        QuantizationError: When the method can't be loaded here (GPTQ, AWQ and others).
    """
    config = read_config(folder)
    stored = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    if stored is None:
        if (folder / "quantize_config.json").is_file():  # early GPTQ tools wrote only this
            raise _foreign_method("gptq", folder)
        return None
    marked = (
        bits for bits in (4, 8) if stored.get(f"load_in_{bits}bit") or stored.get(f"_load_in_{bits}bit")
    )
    bits = next(marked, None)
    method = stored.get("quant_method", "of an unknown kind" if bits is None else BITSANDBYTES)
    if method != BITSANDBYTES:
        raise _foreign_method(str(method), folder)
    if bits is None:
        raise QuantizationError(
            f"{folder / 'config.json'}: quantization_config has neither load_in_4bit nor load_in_8bit, expected one "
            "of them to be true. Download the model again."
        )
    names = tensor_names(folder)
    modules = frozenset(
        name.removesuffix(suffix) for name in names for suffix in _SCALES if name.endswith(suffix)
    )
    settings = stored | {
        "load_in_4bit": bits == 4,
        "load_in_8bit": bits == 8,
        "bnb_4bit_compute_dtype": compute_dtype,
        "llm_int8_skip_modules": _exact_patterns(names, modules),
    }
    return Quantization(bits, BitsAndBytesConfig(**settings), modules)


def _foreign_method(method: str, folder: Path) -> QuantizationError:
    return QuantizationError(
        f"{folder}: found quantized weights ({method.upper()}), expected full precision or bitsandbytes. Use the "
        "full-precision version of the same model: --use_lora true --tune_llm false --q_lora true quantizes it while "
        "loading."
    )


def _exact_patterns(names: Collection[str], quantized: Collection[str]) -> list[str]:
    """Patterns that match every module whose weight is stored exactly, and no quantized one.

    Layer numbers are folded: transformers tries every pattern on every module, and Python caches only 512
    patterns.
    """
    exact = {name.removesuffix(".weight") for name in names if name.endswith(".weight")} - set(quantized)
    folded = {_fold(name) for name in quantized}
    patterns = {re.escape(name) if _fold(name) in folded else _fold(name) for name in exact}
    # A tied output layer has no tensor of its own in the files.
    return sorted(patterns | {"lm_head"})


def _fold(name: str) -> str:
    return re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name))


def check_training(
    stored: Quantization | None,
    generation: Generation,
    *,
    quant_bits: int | None,
    **tuned: Unpack[TunedParts],
) -> None:
    """Refuse a way of training that the stored weights don't allow; call before loading them.

    Args:
        stored: What the model's files hold; None for full precision, which allows everything.
        generation: The model's generation.
        quant_bits: ``--quant_bits`` with ``--q_lora true``, else None.
        **tuned: Which parts train in full.

    Raises:
        QuantizationError: With the flag to change.
    """
    if stored is None:
        return
    bits = stored.bits
    if quant_bits is None:
        raise QuantizationError(
            f"--model_name_or_path: found {generation.title} weights stored in {bits} bit, which can't be trained: an "
            "optimizer's steps are smaller than the gaps between their values. Train an adapter on them with "
            f"--use_lora true --tune_llm false --q_lora true --quant_bits {bits}, or give the full-precision model."
        )
    if quant_bits != bits:
        raise QuantizationError(
            f"--quant_bits {quant_bits}: the model is stored in {bits} bit. Give --quant_bits {bits}, or the "
            "full-precision model, which is quantized while loading."
        )
    for part, trains in tuned.items():
        quantized = sorted(name for name in stored.modules if generation.part_of(f"{name}.weight") == part)
        if trains and quantized:
            raise QuantizationError(
                f"--tune_{part} true: {len(quantized)} layers of that part are stored in {bits} bit (the first is "
                f"{quantized[0]}) and can't be trained. Give --tune_{part} false, or the full-precision model with "
                "--q_lora true, which does not quantize that part."
            )

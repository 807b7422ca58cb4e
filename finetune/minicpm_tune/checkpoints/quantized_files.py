"""Checkpoints whose files hold quantised weights: what they hold, and what can be trained on them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.checkpoints.weight_files import tensor_names
from minicpm_tune.errors import UserError

BITSANDBYTES = "bitsandbytes"
# Tensors that bitsandbytes stores beside a weight: the scales of a 4-bit and of an 8-bit one.
_SCALES = (".weight.absmax", ".SCB")


class QuantizationError(UserError):
    """A quantised checkpoint, or a wish for one, that can't be served; the message says what to do."""


@dataclass(frozen=True)
class Quantization:
    """How a model's weights are to be quantised, or are in its files.

    Attributes:
        bits: 4 or 8.
        settings: What bitsandbytes is told.
        modules: Names of the modules that are quantised in the files; empty for a checkpoint in full
            precision, which is quantised while loading.
    """

    bits: int
    settings: BitsAndBytesConfig
    modules: frozenset[str] = frozenset()

    @property
    def stored(self) -> bool:
        """True when the files hold quantised weights."""
        return bool(self.modules)


def stored_quantization(folder: Path, *, compute_dtype: torch.dtype = torch.float32) -> Quantization | None:
    """Tell how a checkpoint's weights are quantised in its files; None for full precision.

    config.json says the method and its settings. Which modules are quantised is read off the tensors
    themselves, because ``llm_int8_skip_modules`` may be missing, or mean other modules in another
    version of transformers.

    Args:
        folder: The checkpoint.
        compute_dtype: What the run computes in; replaces the stored one.

    Raises:
        QuantizationError: When the method can't be loaded here (GPTQ, AWQ and others).
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    if stored is None:
        if (folder / "quantize_config.json").is_file():  # early GPTQ tools wrote only this
            raise _foreign_method("gptq", folder)
        return None
    bits = _bits_of(stored)
    method = stored.get("quant_method", "of an unknown kind" if bits is None else BITSANDBYTES)
    if method != BITSANDBYTES:
        raise _foreign_method(str(method), folder)
    if bits is None:
        raise QuantizationError(
            f"{folder / 'config.json'}: quantization_config has neither load_in_4bit nor load_in_8bit, "
            "expected one of them to be true. Download the checkpoint again."
        )
    names = tensor_names(folder)
    modules = frozenset(
        name.removesuffix(suffix) for name in names for suffix in _SCALES if name.endswith(suffix)
    )
    known = vars(BitsAndBytesConfig()).keys() | {"load_in_4bit", "load_in_8bit"}
    settings = {key: value for key, value in stored.items() if key in known and not key.startswith("_")}
    settings.pop("quant_method", None)
    settings |= {"load_in_4bit": bits == 4, "load_in_8bit": bits == 8}
    settings |= {
        "bnb_4bit_compute_dtype": compute_dtype,
        "llm_int8_skip_modules": _exact_patterns(names, modules),
    }
    return Quantization(bits, BitsAndBytesConfig(**settings), modules)


def _bits_of(stored: dict[str, Any]) -> int | None:
    for bits in (4, 8):
        if stored.get(f"load_in_{bits}bit") or stored.get(f"_load_in_{bits}bit"):
            return bits
    return None


def _foreign_method(method: str, folder: Path) -> QuantizationError:
    return QuantizationError(
        f"{folder}: the weights are quantised ({method.upper()}), expected full precision or bitsandbytes. "
        "Neither they nor adapters on them can be trained here. Use the full-precision checkpoint of the "
        "same model: with --use_lora true --tune_llm false --q_lora true it is quantised while it is loaded."
    )


def _exact_patterns(names: Collection[str], quantised: Collection[str]) -> list[str]:
    """Patterns that match every module whose weight is stored exactly, and no quantised one.

    Layer numbers are folded, because transformers tries every pattern on every module and Python caches
    no more than 512 of them.
    """
    exact = {name.removesuffix(".weight") for name in names if name.endswith(".weight")} - set(quantised)
    folded = {_fold(name) for name in quantised}
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
    vision: bool,
    resampler: bool,
) -> None:
    """Refuse a way of training that the stored weights don't allow; call before they are loaded.

    Args:
        stored: What the checkpoint's files hold; None: full precision, everything is allowed.
        generation: The checkpoint's generation.
        quant_bits: ``--quant_bits`` with ``--q_lora true``, else None.
        vision: Whether the vision tower trains in full.
        resampler: Whether the resampler trains in full.

    Raises:
        QuantizationError: With the flag to change.
    """
    if stored is None:
        return
    bits = stored.bits
    if quant_bits is None:
        raise QuantizationError(
            f"This {generation.title} checkpoint is stored in {bits} bit, and such weights can't be trained: "
            "an optimizer's steps are smaller than the gaps between the values they can take. Train adapters "
            f"on it with --use_lora true --tune_llm false --q_lora true --quant_bits {bits}, or give the "
            "full-precision checkpoint."
        )
    if quant_bits != bits:
        raise QuantizationError(
            f"--quant_bits {quant_bits}: this checkpoint is stored in {bits} bit. Give --quant_bits {bits}, "
            "or the full-precision checkpoint, which is quantised while it is loaded."
        )
    for part, trains in (("vision", vision), ("resampler", resampler)):
        quantised = sorted(name for name in stored.modules if generation.part_of(f"{name}.weight") == part)
        if trains and quantised:
            raise QuantizationError(
                f"--tune_{part} true: {len(quantised)} layers of that part are stored in {bits} bit in this "
                f"checkpoint (the first is {quantised[0]}) and can't be trained. Give --tune_{part} false, "
                "or the full-precision checkpoint with --q_lora true, which keeps that part exact."
            )

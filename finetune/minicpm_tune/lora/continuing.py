"""Going on with an adapter: it must be one of this model, and no flag may ask for another shape than it has."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.lora.build import AdapterError, default_modules_to_save, translated_pattern
from minicpm_tune.lora.folders import AdapterFolder, check_base, read_adapter_folder
from minicpm_tune.settings.argument_groups import LoraArguments

logger = logging.getLogger(__name__)

# Flag -> what adapter_config.json calls it. The shape of an adapter is settled when it is made.
_SHAPE = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_bias": "bias",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "lora_target_modules": "target_modules",
    "lora_layer_replication": "layer_replication",
    "lora_layers_to_transform": "layers_to_transform",
    "lora_layers_pattern": "layers_pattern",
}


def check_continued(
    lora: LoraArguments, base: Path, generation: Generation, *, vision: bool, resampler: bool
) -> None:
    """Refuse to go on with an adapter that the model or the flags don't fit; call before weights are loaded.

    Args:
        lora: The adapter's arguments; ``lora_weight_path`` names it.
        base: The base model's folder.
        generation: Its generation.
        vision: ``--tune_vision``.
        resampler: ``--tune_resampler``.

    Raises:
        AdapterError: With all that contradicts.
    """
    adapter = read_adapter_folder(lora.lora_weight_path, flag="--lora_weight_path")
    if adapter.is_legacy:
        raise AdapterError(
            f"--lora_weight_path {adapter.path}: an adapter of the early official scripts, whose vision tower, "
            "resampler and embeddings stand in a file of their own. Merge it with merge_lora.py, and train a new "
            "adapter on the result."
        )
    check_base(adapter, base, generation, allow_other_base=lora.allow_other_base)
    problems = [*_shapes(adapter, lora, generation)]
    problems += _whole_modules(
        adapter, lora, default_modules_to_save(generation, vision=vision, resampler=resampler)
    )
    if problems:
        raise AdapterError(f"--lora_weight_path {adapter.path}: " + " ".join(problems))
    logger.info(
        "Continuing the adapter %s: rank %s, alpha %s, trained in full: %s.",
        adapter.path, adapter.config.get("r"), adapter.config.get("lora_alpha"),
        ", ".join(_saved(adapter)) or "nothing",
    )  # fmt: skip


def _shapes(adapter: AdapterFolder, lora: LoraArguments, generation: Generation) -> Iterator[str]:
    """A flag that is left at its default asks for nothing; any other must say what the adapter is."""
    defaults = {one.name: one.default for one in fields(LoraArguments)}
    for flag, name in _SHAPE.items():
        wish: Any = getattr(lora, flag)
        if wish == defaults[flag]:
            continue
        if flag == "lora_target_modules":
            wish = translated_pattern(wish, generation)
        if flag == "lora_layer_replication":
            wish = [list(pair) for pair in lora.layer_replication or []]
        found = adapter.config.get(name)
        if found != wish:
            yield f"--{flag} is {getattr(lora, flag)}, the adapter was made with {found}: leave the flag out."


def _whole_modules(adapter: AdapterFolder, lora: LoraArguments, default: list[str]) -> Iterator[str]:
    asked = default if lora.modules_to_save is None else lora.modules_to_save
    found = _saved(adapter)
    if set(asked) != set(found):
        yield (
            f"it trains {', '.join(found) or 'no module'} in full, these flags ask for {', '.join(asked) or 'none'}. "
            f"Give --lora_modules_to_save {','.join(found) or 'none'}, or the --tune_vision and --tune_resampler "
            "that it was trained with."
        )


def _saved(adapter: AdapterFolder) -> list[str]:
    return adapter.config.get("modules_to_save") or []

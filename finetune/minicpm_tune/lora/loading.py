"""A saved adapter on its base model: every tensor of its files finds its place, and a run can continue it.

A continued adapter must have been trained on this model. Its rank, targets and other properties are fixed;
a flag that asks for different ones is refused.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Unpack

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from minicpm_tune.checkpoints.model_generations import Generation, TunedParts, plain_name
from minicpm_tune.checkpoints.vocabulary import read_new_tokens
from minicpm_tune.checkpoints.weight_files import tensors_in_file
from minicpm_tune.files import unreadable_files_as_messages
from minicpm_tune.lora.adapter_folders import (
    LEGACY_FILE,
    AdapterError,
    AdapterFolder,
    check_base,
    read_adapter_folder,
)
from minicpm_tune.lora.build import (
    check_experts,
    layers_reachable,
    modules_of_new_tokens,
    modules_to_save,
    restore_output_layer,
    translated_pattern,
)
from minicpm_tune.settings.argument_groups import LoraArguments

logger = logging.getLogger(__name__)

# A buffer or a parameter in the released classes; computed from 2.5 on.
_COMPUTED = "resampler.pos_embed"
# Flag -> its name in adapter_config.json.
_PROPERTIES = {
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


def load_adapter(model: PreTrainedModel, adapter: AdapterFolder, *, trainable: bool = False) -> PeftModel:
    """Put an adapter on its base model; see ``adapter_folders.check_base``.

    Args:
        model: The base model.
        adapter: The adapter, of any age.
        trainable: True to continue training it; otherwise the model is put in eval mode.

    Raises:
        AdapterError: When its tensors are not exactly those that the model has places for.
    """
    has = dict(getattr(model, "new_tokens", {}))
    if has != adapter.new_tokens:
        raise AdapterError(
            f"{adapter.path}: the adapter was trained with {len(adapter.new_tokens)} new tokens, the model here has "
            f"{len(has)}, or others, or with other ids. Give the base model it was trained on."
        )
    model.requires_grad_(False)
    try:
        with layers_reachable(model), unreadable_files_as_messages(adapter.path):
            wrapped = PeftModel.from_pretrained(model, adapter.path, is_trainable=trainable)
    except RuntimeError as error:
        raise AdapterError(
            f"{adapter.path}: the adapter's weights don't fit this model ({error}). Give the base model it was "
            "trained on."
        ) from error
    restore_output_layer(wrapped)
    _check_tensors(wrapped, adapter)
    if adapter.is_legacy:
        _load_legacy_tensors(wrapped, adapter.path / LEGACY_FILE)
    return wrapped if trainable else wrapped.eval()


def _check_tensors(wrapped: PeftModel, adapter: AdapterFolder) -> None:
    """Compare names: PEFT passes over tensors without a place, and leaves missing ones as initialized."""
    stored = {tensor.name for tensor in tensors_in_file(adapter.weights)}
    known = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    unknown, missing = sorted(stored - known), sorted(known - stored)
    if unknown or missing:
        raise AdapterError(
            f"{adapter.path}: {len(unknown)} tensors have no place in this model and {len(missing)} are "
            f"missing (the first is {[*unknown, *missing][0]}), expected an adapter of this model. Give the "
            "base model it was trained on."
        )


def _load_legacy_tensors(model: PeftModel, path: Path) -> None:
    """Load the modules that the early official scripts kept beside the adapter, under the names of the wrapped model.

    Source: the official finetune/readme.md of May 2024 (``base_model.model.resampler.query``). No such file was
    available, so all wrapper prefixes are stripped, and a tensor without a place in the model is an error.
    """
    # Not the copies that PEFT keeps of modules before training.
    places = {
        plain_name(name): value for name, value in model.named_parameters() if "original_module." not in name
    }
    loaded = 0
    for name, tensor in _read_legacy_file(path).items():
        place = places.get(plain_name(name))
        if place is None and plain_name(name) == _COMPUTED:
            continue
        if place is None or place.shape != tensor.shape:
            found = "no parameter of this model" if place is None else f"of shape {tuple(place.shape)} here"
            raise AdapterError(
                f"{path}: {name}, of shape {tuple(tensor.shape)}, is {found}. Give the base model that the "
                "adapter was trained on."
            )
        place.data.copy_(tensor)
        loaded += 1
    logger.info("%s: %d tensors of vision, resampler and embeddings.", path.name, loaded)


def _read_legacy_file(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise AdapterError(
            f"{path}: can't be read as plain tensors ({str(error).splitlines()[0]}), expected a state dict. "
            "Copy it again."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise AdapterError(
            f"{path}: holds a {type(content).__name__} with values that are not tensors, expected a state dict. "
            "Copy it again."
        )
    return content


def adapter_to_continue(lora: LoraArguments) -> AdapterFolder | None:
    """The adapter that ``--lora_weight_path`` names; None where a run trains a new one.

    Raises:
        AdapterError: When there is none, or only part of one.
    """
    path = lora.lora_weight_path
    return read_adapter_folder(path, flag="--lora_weight_path") if path else None


def new_tokens_of_run(file: str | None, lora: LoraArguments | None) -> tuple[str, ...]:
    """The tokens that a run adds: those of its file, or of the adapter that it continues.

    Args:
        file: ``--new_tokens``.
        lora: The adapter's arguments; None without an adapter.

    Raises:
        VocabularyError: When the file can't be used.
        AdapterError: When the adapter has other tokens than the file.
    """
    tokens = () if file is None else read_new_tokens(file)
    adapter = None if lora is None else adapter_to_continue(lora)
    if adapter is None:
        return tokens
    known = tuple(sorted(adapter.new_tokens, key=adapter.new_tokens.__getitem__))
    if file is not None and tokens != known:
        raise AdapterError(
            f"--new_tokens {file}: found {len(tokens)} tokens, expected the {len(known)} that the adapter "
            f"{adapter.path} was trained with, in their order. Leave --new_tokens out; the adapter has its own tokens."
        )
    return known


def check_adapter(
    lora: LoraArguments,
    base: Path,
    generation: Generation,
    *,
    adds_tokens: bool = False,
    downsample_mode: str | None = None,
    **tuned: Unpack[TunedParts],
) -> None:
    """Check what an adapter run asks for, as far as possible before weights are loaded.

    Warns of an adapter that the released code can't load. Refuses to continue one that does not belong to this
    model, or has other properties than these flags ask for.

    Args:
        lora: The adapter's arguments; ``lora_weight_path`` names an adapter to continue.
        base: The base model's folder.
        generation: Its generation.
        adds_tokens: Whether the run adds tokens.
        downsample_mode: The run's; None for models without.
        **tuned: Which parts train in full.

    Raises:
        AdapterError: With every contradiction.
    """
    check_experts(generation, lora)
    saved = modules_to_save(generation, lora, adds_tokens=adds_tokens, **tuned)
    lacks = [name for name in modules_of_new_tokens(generation) if adds_tokens and name not in saved]
    if lacks:
        raise AdapterError(
            f"--lora_modules_to_save {','.join(saved) or 'none'}: the list lacks {' and '.join(lacks)}, "
            "in which new tokens are learned. Add them, or leave the flag out."
        )
    if generation.reads_inside_tower and not set(saved).isdisjoint(generation.modules["vision"]):
        logger.warning(
            "The adapter of this run will hold the vision tower (%s). The released code of %s can't load such an "
            "adapter, because it reads attributes inside the tower, which PEFT wraps. chat.py, predict.py and "
            "merge_lora.py load it: merge it before using it elsewhere, or give --tune_vision false.",
            ", ".join(generation.modules["vision"]), generation.title,
        )  # fmt: skip
    adapter = adapter_to_continue(lora)
    if adapter is None:
        return
    if adapter.is_legacy:
        raise AdapterError(
            f"--lora_weight_path {adapter.path}: found an adapter of the early official scripts, which keep vision "
            "tower, resampler and embeddings in a separate file. Merge it with merge_lora.py, and train a new adapter "
            "on the result."
        )
    check_base(adapter, base, generation, allow_other_base=lora.allow_other_base)
    problems = list(_contradictions(adapter, lora, generation, saved, downsample_mode))
    if problems:
        raise AdapterError(f"--lora_weight_path {adapter.path}: " + " ".join(problems))
    logger.info(
        "Continuing the adapter %s: rank %s, alpha %s, trained in full: %s.",
        adapter.path, adapter.config.get("r"), adapter.config.get("lora_alpha"),
        ", ".join(adapter.modules_to_save) or "nothing",
    )  # fmt: skip


def _contradictions(
    adapter: AdapterFolder, lora: LoraArguments, generation: Generation, saved: list[str], mode: str | None
) -> Iterator[str]:
    """What the flags that were changed from their defaults, ``saved`` and ``mode`` ask for, and the adapter is not."""
    defaults = LoraArguments()
    wanted = asdict(lora) | {
        "lora_target_modules": translated_pattern(lora.lora_target_modules, generation),
        "lora_layer_replication": [list(pair) for pair in lora.layer_replication or []],
    }
    for flag, name in _PROPERTIES.items():
        asked, found = getattr(lora, flag), adapter.config.get(name)
        if asked != getattr(defaults, flag) and found != wanted[flag]:
            yield f"--{flag} is {asked}, but the adapter has {found}: leave the flag out."
    if lora.lora_experts and not adapter.config.get("target_parameters"):
        yield "--lora_experts is True, but the adapter has none for experts: leave the flag out."
    trained = adapter.modules_to_save
    if set(saved) != set(trained):
        yield (
            f"it trains {', '.join(trained) or 'no module'} in full, these flags ask for "
            f"{', '.join(saved) or 'none'}. Give --lora_modules_to_save {','.join(trained) or 'none'}, or the "
            "--tune_vision and --tune_resampler that it was trained with."
        )
    if adapter.downsample_mode not in (None, mode):
        yield (
            f"it was trained with --downsample_mode {adapter.downsample_mode}, this run has {mode}. Give "
            f"--downsample_mode {adapter.downsample_mode}, or train a new adapter."
        )

"""A saved adapter on its base model: every tensor of its files finds its place, and a run can continue it.

The early official scripts kept the modules trained in full beside the adapter, in
``vpm_resampler_embedtokens.pt``: tensors of ``vpm``, ``resampler`` and ``embed_tokens`` under the names of
the wrapped model, such as ``base_model.model.resampler.query``.

Source of that format: the official finetune/readme.md of May 2024. No such file was available, so all
wrapper prefixes are stripped, and a tensor without a place in the model is an error.

A continued adapter must have been trained on this model. Its rank, targets and other properties are fixed;
a flag that asks for different ones is refused.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from minicpm_tune.checkpoints.model_generations import Generation, plain_name
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
    add_adapter,
    check_experts,
    default_modules_to_save,
    layers_reachable,
    log_adapted_modules,
    modules_of_new_tokens,
    restore_output_layer,
    set_frozen_copies_aside,
    translated_pattern,
)
from minicpm_tune.settings.argument_groups import LoraArguments

logger = logging.getLogger(__name__)

# A buffer or a parameter in the released classes; computed from 2.5 on.
_COMPUTED = "resampler.pos_embed"


def load_adapter(model: PreTrainedModel, adapter: AdapterFolder, *, trainable: bool = False) -> PeftModel:
    """Put an adapter on its base model; see ``adapter_folders.check_base``.

    Args:
        model: The base model.
        adapter: The adapter, of any age.
        trainable: True to continue training it; otherwise the model is put in eval mode.

    Raises:
        AdapterError: When its tensors are not exactly those that the model has places for.
    """
    _check_new_tokens(model, adapter)
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


def _check_new_tokens(model: PreTrainedModel, adapter: AdapterFolder) -> None:
    has = dict(getattr(model, "new_tokens", {}))
    if has != adapter.new_tokens:
        raise AdapterError(
            f"{adapter.path}: the adapter was trained with {len(adapter.new_tokens)} new tokens, the model here has "
            f"{len(has)}, or others, or with other ids. Give the base model it was trained on."
        )


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
    # Not the copies that PEFT keeps of modules before training.
    places = {
        plain_name(name): value for name, value in model.named_parameters() if "original_module." not in name
    }
    loaded = 0
    for name, tensor in _read_legacy_file(path).items():
        plain = plain_name(name)
        if plain == _COMPUTED and plain not in places:
            continue
        if plain not in places or places[plain].shape != tensor.shape:
            found = (
                f"of shape {tuple(places[plain].shape)} here"
                if plain in places
                else "no parameter of this model"
            )
            raise AdapterError(
                f"{path}: {name}, of shape {tuple(tensor.shape)}, is {found}. Give the base model that the "
                "adapter was trained on."
            )
        places[plain].data.copy_(tensor)
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
    "lora_experts": "target_parameters",
}


def new_or_continued_adapter(
    model: PreTrainedModel,
    generation: Generation,
    lora: LoraArguments,
    *,
    vision: bool,
    resampler: bool,
    audio: bool = False,
) -> PeftModel:
    """Put the run's adapter on its base model.

    Args:
        model: The base model.
        generation: Its generation.
        lora: The adapter's arguments; ``lora_weight_path`` names one to continue.
        vision: ``--tune_vision``.
        resampler: ``--tune_resampler``.
        audio: ``--tune_audio``.

    Raises:
        AdapterError: As ``build.add_adapter`` and ``loading.load_adapter``.
    """
    if lora.lora_weight_path:
        wrapped = load_adapter(
            model, read_adapter_folder(lora.lora_weight_path, flag="--lora_weight_path"), trainable=True
        )
    else:
        wrapped = add_adapter(model, generation, lora, vision=vision, resampler=resampler, audio=audio)
        log_adapted_modules(wrapped)
    set_frozen_copies_aside(wrapped)
    return wrapped


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
    if lora is None or not lora.lora_weight_path:
        return tokens
    adapter = read_adapter_folder(lora.lora_weight_path, flag="--lora_weight_path")
    known = tuple(sorted(adapter.new_tokens, key=adapter.new_tokens.__getitem__))
    if file is not None and tokens != known:
        raise AdapterError(
            f"--new_tokens {file}: found {len(tokens)} tokens, expected the {len(known)} that the adapter "
            f"{adapter.path} was trained with, in their order. Leave --new_tokens out; the adapter brings its tokens."
        )
    return known


def check_adapter(
    lora: LoraArguments,
    base: Path,
    generation: Generation,
    *,
    vision: bool,
    resampler: bool,
    audio: bool = False,
    adds_tokens: bool = False,
    downsample_mode: str | None = None,
) -> None:
    """Check what an adapter run asks for, as far as possible before weights are loaded.

    Warns of an adapter that the released code can't load. Refuses to continue one that does not belong to this
    model, or has other properties than these flags ask for.

    Args:
        lora: The adapter's arguments; ``lora_weight_path`` names an adapter to continue.
        base: The base model's folder.
        generation: Its generation.
        vision: ``--tune_vision``.
        resampler: ``--tune_resampler``.
        audio: ``--tune_audio``.
        adds_tokens: Whether the run adds tokens.
        downsample_mode: The run's; None for models without.

    Raises:
        AdapterError: With every contradiction.
    """
    check_experts(generation, lora)
    saved = lora.modules_to_save
    if saved is None:
        saved = default_modules_to_save(
            generation, vision=vision, resampler=resampler, audio=audio, adds_tokens=adds_tokens
        )
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
    if not lora.lora_weight_path:
        return
    adapter = read_adapter_folder(lora.lora_weight_path, flag="--lora_weight_path")
    if adapter.is_legacy:
        raise AdapterError(
            f"--lora_weight_path {adapter.path}: found an adapter of the early official scripts, which keep vision "
            "tower, resampler and embeddings in a separate file. Merge it with merge_lora.py, and train a new adapter "
            "on the result."
        )
    check_base(adapter, base, generation, allow_other_base=lora.allow_other_base)
    problems = [
        *_other_properties(adapter, lora, generation),
        *_other_saved_modules(adapter, saved),
        *_other_mode(adapter, downsample_mode),
    ]
    if problems:
        raise AdapterError(f"--lora_weight_path {adapter.path}: " + " ".join(problems))
    logger.info(
        "Continuing the adapter %s: rank %s, alpha %s, trained in full: %s.",
        adapter.path, adapter.config.get("r"), adapter.config.get("lora_alpha"),
        ", ".join(_saved(adapter)) or "nothing",
    )  # fmt: skip


def _other_properties(adapter: AdapterFolder, lora: LoraArguments, generation: Generation) -> Iterator[str]:
    """Compare each flag that was changed from its default with what the adapter has."""
    defaults = {one.name: one.default for one in fields(LoraArguments)}
    for flag, name in _PROPERTIES.items():
        wanted: Any = getattr(lora, flag)
        if wanted == defaults[flag]:
            continue
        if flag == "lora_target_modules":
            wanted = translated_pattern(wanted, generation)
        if flag == "lora_experts":  # always a change: the default is false
            if not adapter.config.get("target_parameters"):
                yield "--lora_experts is True, but the adapter has none for experts: leave the flag out."
            continue
        if flag == "lora_layer_replication":
            wanted = [list(pair) for pair in lora.layer_replication or []]
        found = adapter.config.get(name)
        if found != wanted:
            yield f"--{flag} is {getattr(lora, flag)}, but the adapter has {found}: leave the flag out."


def _other_mode(adapter: AdapterFolder, mode: str | None) -> Iterator[str]:
    if adapter.downsample_mode not in (None, mode):
        yield (
            f"it was trained with --downsample_mode {adapter.downsample_mode}, this run has {mode}. Give "
            f"--downsample_mode {adapter.downsample_mode}, or train a new adapter."
        )


def _other_saved_modules(adapter: AdapterFolder, wanted: list[str]) -> Iterator[str]:
    found = _saved(adapter)
    if set(wanted) != set(found):
        yield (
            f"it trains {', '.join(found) or 'no module'} in full, these flags ask for "
            f"{', '.join(wanted) or 'none'}. Give --lora_modules_to_save {','.join(found) or 'none'}, or the "
            "--tune_vision and --tune_resampler that it was trained with."
        )


def _saved(adapter: AdapterFolder) -> list[str]:
    """Names of the modules it trains in full; PEFT lists those of tied weights twice, also by their whole name."""
    names = adapter.config.get("modules_to_save") or []
    return [name for name in names if not any(name.endswith(f".{other}") for other in names)]

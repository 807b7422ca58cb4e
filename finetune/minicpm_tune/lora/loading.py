"""Putting a saved adapter on its base model, so that every tensor of its files finds its place.

The early official scripts kept the modules trained in full beside the adapter, in
``vpm_resampler_embedtokens.pt``: tensors of ``vpm``, ``resampler`` and ``embed_tokens`` under the names of
the wrapped model, such as ``base_model.model.resampler.query``.

Source of that format: the official finetune/readme.md of May 2024. No such file was available, so all
wrapper prefixes are stripped, and a tensor without a place in the model is an error.
"""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from minicpm_tune.checkpoints.model_generations import plain_name
from minicpm_tune.checkpoints.weight_files import tensors_in_file
from minicpm_tune.lora.adapter_folders import LEGACY_FILE, AdapterError, AdapterFolder
from minicpm_tune.lora.build import layers_reachable, restore_output_layer
from minicpm_tune.safe_loading import unreadable_files_as_messages

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

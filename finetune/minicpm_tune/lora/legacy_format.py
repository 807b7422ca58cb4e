"""Adapters of the early official scripts, which kept the modules trained in full in a file of their own.

Beside the adapter they wrote ``vpm_resampler_embedtokens.pt``: tensors of ``vpm``, ``resampler`` and
``embed_tokens`` under the names of the wrapped model, such as ``base_model.model.resampler.query``, to be
read with ``model.load_state_dict(..., strict=False)``.

Source: the official finetune/readme.md of May 2024. No such file was at hand; prefixes of wrappers are
taken off generously, and a tensor without a place in the model is an error.
"""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from minicpm_tune.checkpoints.model_generations import plain_name
from minicpm_tune.lora.build import AdapterError

logger = logging.getLogger(__name__)

LEGACY_NAME = "vpm_resampler_embedtokens.pt"
# Released classes have it as a buffer or a parameter; from 2.5 on it is computed.
_COMPUTED = "resampler.pos_embed"


def load_legacy_tensors(model: PeftModel, path: Path) -> None:
    """Put the tensors of the file into a model that carries the adapter.

    Args:
        model: The wrapped model.
        path: The ``vpm_resampler_embedtokens.pt``.

    Raises:
        AdapterError: When the file holds anything but tensors, or tensors of another model.
    """
    tensors = _read(path)
    # The copy that PEFT keeps of a module's untrained state must stay.
    places = {
        plain_name(name): value for name, value in model.named_parameters() if "original_module." not in name
    }
    loaded = 0
    for name, tensor in tensors.items():
        plain = plain_name(name)
        if plain == _COMPUTED and plain not in places:
            continue
        if plain not in places or places[plain].shape != tensor.shape:
            found = (
                "no parameter of this model"
                if plain not in places
                else f"of shape {tuple(places[plain].shape)} here"
            )
            raise AdapterError(
                f"{path}: {name}, of shape {tuple(tensor.shape)}, is {found}. Give the base model that the "
                "adapter was trained on."
            )
        places[plain].data.copy_(tensor)
        loaded += 1
    logger.info("%s: %d tensors of vision, resampler and embeddings.", path.name, loaded)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise AdapterError(
            f"{path}: can't be read as plain tensors ({str(error).splitlines()[0]}), expected a state dict. "
            "Copy it again."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise AdapterError(
            f"{path}: holds a {type(content).__name__} with other things than tensors. Copy it again."
        )
    return content

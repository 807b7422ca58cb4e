"""A checkpoint of any generation -> a model with its weights, and with rows for tokens that a run adds.

Letters: V rows of the embeddings, D hidden width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from minicpm_tune.checkpoints.model_folder import read_generation, resolve_model_folder, stored_dtype
from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.checkpoints.weight_files import WeightFileError
from minicpm_tune.files import unreadable_files_as_messages
from minicpm_tune.models.quantization import finish_loading, loading_arguments, loading_quantization

logger = logging.getLogger(__name__)


def load_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    attention: str = "sdpa",
    quant_bits: int | None = None,
    downsample_mode: str | None = None,
    cache_dir: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a checkpoint of any generation into this project's class for it.

    Weights that the files hold in 4 or 8 bit stay so.

    Args:
        name_or_path: The checkpoint's folder, or its hub id.
        dtype: What the weights are cast to while loading; by default what config.json names.
        attention: transformers' ``attn_implementation`` for the LLM.
        quant_bits: 4 or 8: the LLM's linear layers are quantized while loading. They compute in ``dtype``.
        downsample_mode: 4.6 and 4.7: ``4x`` or ``16x``; by default what config.json says.
        cache_dir: Where a download goes; huggingface_hub's default when None.
        **kwargs: Handed to ``from_pretrained`` (``device_map``).

    Returns:
        The model in evaluation mode, as ``from_pretrained`` gives it.

    Raises:
        ModelFolderError: When there is no such checkpoint.
        UnknownCheckpointError: When the checkpoint is none of the generations.
        WeightFileError: When weight files are missing or lack parameters of the model.
        QuantizationError: When they are quantized in a way that does not fit.
    """
    folder = resolve_model_folder(str(name_or_path), cache_dir=cache_dir)
    generation = read_generation(folder)
    dtype = stored_dtype(folder) if dtype is None else dtype
    quantization = loading_quantization(folder, generation, bits=quant_bits, compute_dtype=dtype)
    kind = model_class(generation)
    config = kind.config_class.from_pretrained(folder)
    if downsample_mode is not None:
        config.downsample_mode = downsample_mode
    kwargs |= loading_arguments(quantization, config)
    with unreadable_files_as_messages(folder):
        model, report = kind.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            **kwargs,
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise WeightFileError(
            f"{folder}: the weights lack {len(missing)} of the model's parameters, the first is {missing[0]}. Expected "
            f"a complete {generation.title} checkpoint; an adapter folder goes to --lora_weight_path."
        )
    if quantization is not None:
        finish_loading(model, generation, dtype)
    return model


def model_class(generation: Generation) -> Any:
    """Give the model class of a generation; see ``minicpm_tune.models`` for what a class offers.

    Families are imported when they are asked for: each imports its own part of transformers.
    """
    return import_module(f"minicpm_tune.models.{generation.family}").model_class(generation)


def add_token_rows(model: PreTrainedModel, tokens: Mapping[str, int]) -> None:
    """Give every new token a row in the embeddings and the output layer.

    New rows are the mean of all others, so that at first new tokens are neither likely nor unlikely.

    Source: J. Hewitt, "Initializing New Word Embeddings for Pretrained Language Models" (2021).

    Args:
        model: The model without adapters; its configuration and its saved tokenizer follow.
        tokens: Token -> id, from ``vocabulary.add_tokens``.
    """
    if not tokens:
        return
    embeddings: Any = model.get_input_embeddings()
    output: Any = model.get_output_embeddings()
    tied = output.weight is embeddings.weight
    ids = torch.tensor(sorted(tokens.values()))
    _set_rows(embeddings, ids)
    if tied:
        output.weight = embeddings.weight
    else:
        _set_rows(output, ids)
    rows = embeddings.weight.shape[0]
    embeddings.num_embeddings = output.out_features = rows
    model.config.get_text_config().vocab_size = rows
    released = getattr(model.config, "released", None)
    if released is not None:
        released["vocab_size"] = rows
    holder: Any = model
    holder.new_tokens = dict(tokens)
    logger.info("%d new tokens, ids %d to %d; the embeddings have %d rows.", len(ids), ids[0], ids[-1], rows)


def _set_rows(module: Any, ids: Tensor) -> None:
    """Replace a weight [V, D] by one in which the rows ``ids`` are there, and the mean of the others."""
    with _whole(module.weight) as old:
        grown = old.new_empty((max(len(old), int(ids[-1]) + 1), old.shape[1]))
        grown[: len(old)] = old
    others = torch.ones(len(grown), dtype=torch.bool)
    others[ids] = False
    grown[ids] = grown[others].float().mean(dim=0).to(grown.dtype)
    module.weight = nn.Parameter(grown, requires_grad=module.weight.requires_grad)


@contextmanager
def _whole(weight: nn.Parameter) -> Iterator[Tensor]:
    """A weight's values, also where ZeRO-3 holds only a share of them here."""
    if not is_deepspeed_zero3_enabled():
        yield weight.detach()
        return
    import deepspeed  # takes seconds, and only ZeRO-3 needs it

    with deepspeed.zero.GatheredParameters([weight]):
        yield weight.detach()

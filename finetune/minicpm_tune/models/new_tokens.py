"""Embeddings for tokens that a run adds: rows in the input embeddings and in the output layer.

Letters: V rows of the embeddings, D hidden width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

logger = logging.getLogger(__name__)


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
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        yield weight.detach()

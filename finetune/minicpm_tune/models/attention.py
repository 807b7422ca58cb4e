"""Attention that stays within a slice (vision tower, resampler), and within a packed sample (LLM).

Letters: N tokens of all slices, S slices, H heads, E head width, Q queries per placeholder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def attend_within_slices(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Sequence[int],
    query_length: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend from every token to the tokens of its own slice.

    On a GPU in half precision this is one variable-length kernel for all slices; elsewhere it is one
    dense call per run of equally long slices.

    Args:
        query: [N, H, E]; or [units * Q, H, E] when ``query_length`` is Q.
        key: [N, H, E].
        value: [N, H, E].
        lengths: Tokens of each slice; their sum is N.
        query_length: Queries per slice, where they are not the tokens themselves (resampler).
        scale: Factor on the scores; E ** -0.5 by default.

    Returns:
        Mixed values, in the form of ``query``.
    """
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        return _varlen(query, key, value, lengths=lengths, query_length=query_length, scale=scale)
    mixed, start, query_start = [], 0, 0
    for length, run in groupby(lengths):
        count = len(list(run))
        per_slice = length if query_length is None else query_length
        stop, query_stop = start + count * length, query_start + count * per_slice
        parts = (
            query[query_start:query_stop].unflatten(0, (count, per_slice)),
            key[start:stop].unflatten(0, (count, length)),
            value[start:stop].unflatten(0, (count, length)),
        )
        queries, keys, values = (part.transpose(1, 2) for part in parts)
        out = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
        mixed.append(out.transpose(1, 2).flatten(0, 1))
        start, query_start = stop, query_stop
    return torch.cat(mixed)


def _varlen(query, key, value, *, lengths, query_length, scale):
    # Imported here: the module needs a CUDA build of torch to be of use.
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    keys = ends.to(query.device, non_blocking=True)
    longest = max(lengths)
    if query_length is None:
        queries, longest_query = keys, longest
    else:
        queries = torch.arange(len(lengths) + 1, dtype=torch.int32, device=query.device) * query_length
        longest_query = query_length
    return varlen_attn(
        query.contiguous(), key.contiguous(), value.contiguous(),
        queries, keys, longest_query, longest, scale=scale,
    )  # fmt: skip


# The same attention under a name for which transformers makes no mask; without a mask it is causal.
_UNMASKED = "minicpmv_sdpa"
AttentionInterface.register(_UNMASKED, sdpa_attention_forward)


def packed_mask(position_ids: Tensor) -> Tensor:
    """[B, 1, T, T] bool: which tokens each token sees, in rows of several samples.

    Args:
        position_ids: [B, T], restarting at 0 in each sample.

    Example:
        >>> packed_mask(torch.tensor([[0, 1, 0]]))[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    samples = (position_ids == 0).cumsum(dim=1)
    same = samples[:, :, None] == samples[:, None, :]
    return same.tril()[:, None]


@contextmanager
def masks_given(config: Any) -> Iterator[bool]:
    """While it is open the LLM uses the mask it is given and makes none; yields whether that is so.

    Only plain scaled-dot-product attention allows it. What checkpointing recomputes after it is closed is the
    same function with the same mask.

    Args:
        config: The LLM's configuration.
    """
    plain = config._attn_implementation == "sdpa"
    if not plain or "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        yield False
        return
    config._attn_implementation = _UNMASKED
    try:
        yield True
    finally:
        config._attn_implementation = "sdpa"

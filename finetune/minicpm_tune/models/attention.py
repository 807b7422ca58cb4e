"""Attention that stays within a slice (vision tower, resampler), and within a sample (LLM).

Letters: N tokens of all slices or samples, S slices, H heads, E head width, Q queries per placeholder.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from minicpm_tune.models.autocast import to_autocast_dtype
from minicpm_tune.models.batch_layout import SampleLayout, ends_of

# torch 2.11's kernel takes fewer key heads than query heads without being told, and its function has no such argument.
_VARLEN_WANTS_TO_KNOW_GROUPS = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


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

    On a GPU (Ampere or newer) in half precision this is one variable-length kernel for all slices; elsewhere it is one
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
    if _has_varlen_kernel(query):
        keys, longest = ends_of(lengths, query.device), max(lengths)
        queries, longest_query = keys, longest
        if query_length is not None:
            queries, longest_query = ends_of([query_length] * len(lengths), query.device), query_length
        return _varlen((query, key, value), queries, keys, longest_query, longest, scale=scale)
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    query_sizes = sizes if query_length is None else [query_length * count for _, count in runs]
    mixed = []
    for (_, count), *parts in zip(
        runs, query.split(query_sizes), key.split(sizes), value.split(sizes), strict=True
    ):
        queries, keys, values = (part.unflatten(0, (count, -1)).transpose(1, 2) for part in parts)
        out = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
        mixed.append(out.transpose(1, 2).flatten(0, 1))
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)  # a single one needs no copy


def _varlen(
    parts: Sequence[Tensor],
    query_ends: Tensor,
    key_ends: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float | None,
    causal: bool = False,
    groups: int = 1,
) -> Tensor:
    """[N, H, E] query, key and value -> [N, H, E]; ``groups`` query heads share a key head."""
    query, key, value = (part.contiguous() for part in parts)
    options: dict[str, Any] = {"window_size": (-1, 0)} if causal else {}
    if groups > 1 and _VARLEN_WANTS_TO_KNOW_GROUPS:
        options["enable_gqa"] = True
    return varlen.varlen_attn(
        query, key, value, query_ends, key_ends, longest_query, longest_key, scale=scale, **options
    )  # type: ignore[return-value]


# ``sdpa`` under a name of its own: transformers' function and masks, until it is told the samples of a row.
WITHIN_SAMPLES = "sdpa_within_samples"


def attend_within_samples(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sample_lengths: Sequence[int] | None = None,
    sample_ends: Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend from every token to those before it in its own sample.

    transformers calls it in every layer of an LLM. On a GPU in half precision it is one variable-length kernel for
    all samples, elsewhere one causal call per sample; no mask is made, and none is used.

    Args:
        module: The layer.
        query: [1, H, N, E].
        key: [1, H of keys and values, N, E].
        value: As ``key``.
        attention_mask: Of meaning only without ``sample_lengths``.
        sample_lengths: Tokens of each sample; their sum is N. None: transformers' own attention.
        sample_ends: [samples + 1] int32 on the device, see ``SampleLayout.ends``.
        scaling: Factor on the scores; E ** -0.5 by default.
        **kwargs: What transformers gives besides; only its own attention uses it.

    Returns:
        [1, N, H, E], and no weights.
    """
    if sample_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # Rotary positions leave fp32 behind under autocast; a kernel wants one dtype.
    query, key, value = (to_autocast_dtype(part) for part in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if _has_varlen_kernel(query):
        assert sample_ends is not None  # comes with ``sample_lengths``
        parts = [part[0].transpose(0, 1) for part in (query, key, value)]
        longest = max(sample_lengths)
        mixed = _varlen(
            parts, sample_ends, sample_ends, longest, longest, scale=scaling, causal=True, groups=groups
        )
        return mixed[None], None
    samples = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=groups > 1)
        for q, k, v in zip(
            *(part.split(list(sample_lengths), dim=2) for part in (query, key, value)), strict=True
        )
    ]
    mixed = samples[0] if len(samples) == 1 else torch.cat(samples, dim=2)
    return mixed.transpose(1, 2), None


AttentionInterface.register(WITHIN_SAMPLES, attend_within_samples)
AttentionMaskInterface.register(WITHIN_SAMPLES, sdpa_mask)


def keep_samples_apart(config: Any) -> None:
    """Have an LLM that would use ``sdpa`` attend within samples; see ``sample_arguments``.

    LLMs with layers that see only a window keep transformers' own attention and masks.

    Args:
        config: The LLM's configuration.
    """
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if config._attn_implementation == "sdpa" and not windows:
        config._attn_implementation = WITHIN_SAMPLES


def sample_arguments(config: Any, samples: SampleLayout) -> dict[str, Any]:
    """What an LLM is given with the samples of all rows as one row, so that none of them sees another.

    Args:
        config: The LLM's configuration.
        samples: The samples.

    Returns:
        Arguments of its forward: ``attention_mask`` and what its attention needs; nothing in them is read back from
        the device.
    """
    if config._attn_implementation == WITHIN_SAMPLES:
        # A mask in its final form: transformers makes none, and does not look for packed samples on the device.
        given = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=samples.device)
        return {"attention_mask": given, "sample_lengths": samples.samples, "sample_ends": samples.ends}
    if "flash" in str(config._attn_implementation):
        longest = max(samples.samples)
        ends = {"cu_seq_lens_q": samples.ends, "cu_seq_lens_k": samples.ends}
        return {"attention_mask": None, **ends, "max_length_q": longest, "max_length_k": longest}
    return {"attention_mask": None}  # made from the positions, which restart with every sample


def _has_varlen_kernel(query: Tensor) -> bool:
    """Whether torch's variable-length attention takes these tensors (it needs Ampere or newer, torch 2.13)."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )

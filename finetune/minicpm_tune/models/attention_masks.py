"""Masks of the LLM's attention that are made without reading anything back from the device.

transformers (5.23) makes them itself, but asks the positions on the device whether samples are packed, and the
program waits for the answer in every forward. Here it is known beforehand. Letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

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
    """Within it the LLM uses the mask it is given and makes none; yields whether that is so.

    It is for plain scaled-dot-product attention alone. What checkpointing computes again outside of it is the
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

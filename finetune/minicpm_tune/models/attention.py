"""How the slices of a batch lie side by side, and attention that stays within each of them.

Letters: N tokens of all slices, S slices, H heads, E head width, Q queries per placeholder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


@dataclass(frozen=True)
class SliceLayout:
    """The slices of a batch, ordered so that those of equal length are neighbours.

    Equal lengths side by side turn attention within slices into a few dense batches (views, no
    copies) where no variable-length kernel is at hand.

    Attributes:
        grids: [S] (rows, columns) in patches, in the layout's order.
        lengths: [S] tokens per slice, in the layout's order.
        order: [S] which slice of the batch stands at each place of the layout.
        samples: [S] number of the sample each slice belongs to, in the layout's order.
    """

    grids: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]
    order: tuple[int, ...]
    samples: tuple[int, ...]

    @classmethod
    def of(cls, grids: Sequence[tuple[int, int]], samples: Sequence[int] | None = None) -> SliceLayout:
        """Order slices given in the batch's order by their length.

        Args:
            grids: [S] (rows, columns) in patches.
            samples: [S] sample of each slice; needed only by the 2.5 tower.
        """
        order = sorted(range(len(grids)), key=lambda index: grids[index][0] * grids[index][1])
        ordered = tuple(grids[index] for index in order)
        return cls(
            grids=ordered,
            lengths=tuple(rows * columns for rows, columns in ordered),
            order=tuple(order),
            samples=tuple(0 if samples is None else samples[index] for index in order),
        )

    def arrange(self, tokens: Tensor) -> Tensor:
        """Bring [N, ...] tokens from the batch's order into the layout's."""
        pieces = tokens.split(self.batch_lengths())
        return torch.cat([pieces[index] for index in self.order])

    def restore(self, tokens: Tensor) -> Tensor:
        """Bring [N, ...] tokens from the layout's order back into the batch's."""
        pieces = tokens.split(list(self.lengths))
        return torch.cat([pieces[place] for place in self.places()])

    def inverse(self, device: torch.device) -> Tensor:
        """[S] indices that bring one entry per slice back into the batch's order."""
        return torch.tensor(self.places()).to(device, non_blocking=True)

    def in_batch_order(self) -> tuple[list[tuple[int, int]], list[int]]:
        """[S] grids and [S] samples, in the batch's order."""
        places = self.places()
        return [self.grids[place] for place in places], [self.samples[place] for place in places]

    def batch_lengths(self) -> list[int]:
        """Tokens per slice, in the batch's order."""
        return [self.lengths[place] for place in self.places()]

    def places(self) -> list[int]:
        """[S] where each slice of the batch stands in the layout."""
        return sorted(range(len(self.order)), key=self.order.__getitem__)

    def positions(self, number: Callable, *, by_length: bool = False) -> Tensor:
        """[N] table rows: ``number(rows, columns)`` (or ``number(length)``) of every slice."""
        if by_length:
            parts = [torch.from_numpy(number(length)) for length in self.lengths]
        else:
            parts = [torch.from_numpy(number(*grid)) for grid in self.grids]
        return torch.cat(parts)

    def filled_up(self, tokens: Tensor) -> tuple[Tensor, SliceLayout, Tensor]:
        """Fill every slice up with zero tokens to the longest of its sample (the 2.5 quirk).

        Returns:
            The longer tokens, their layout (grids of the real patches), and [N] indices of the real
            tokens among them.
        """
        longest: dict[int, int] = {}
        for sample, length in zip(self.samples, self.lengths, strict=True):
            longest[sample] = max(longest.get(sample, 0), length)
        pieces, kept, start = [], [], 0
        lengths = tuple(longest[sample] for sample in self.samples)
        for piece, full in zip(tokens.split(list(self.lengths)), lengths, strict=True):
            pieces.append(F.pad(piece, (0, 0, 0, full - piece.shape[0])))
            kept.append(torch.arange(start, start + piece.shape[0]))
            start += full
        layout = SliceLayout(self.grids, lengths, self.order, self.samples)
        return torch.cat(pieces), layout, torch.cat(kept)


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

    On a GPU in half precision it is one variable-length kernel for all slices; elsewhere one
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

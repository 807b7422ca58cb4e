"""The resampler: the patches of a placeholder's slices in, its Q embeddings out.

Letters: N patches of all slices, P placeholders, Q queries per placeholder, C width of the vision
tower, D width of the LLM, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minicpm_tune.models.attention import attend_within_slices
from minicpm_tune.models.batch_layout import SliceLayout

HEAD_WIDTH = 128


@dataclass(frozen=True)
class FramePacks:
    """Which slices share a placeholder, in the batch's order (video of V-4.5).

    Attributes:
        sizes: [P] slices per placeholder; slices of one placeholder are neighbors.
        times: [S] time index of each slice, -1 for a still image.
    """

    sizes: tuple[int, ...]
    times: tuple[int, ...]

    @classmethod
    def of(cls, temporal_ids: Any) -> FramePacks:
        """Count the slices of each placeholder in [S, 2] (placeholder, time)."""
        placeholders, times = zip(*temporal_ids.tolist(), strict=True)
        sizes = [0] * (max(placeholders) + 1)
        for placeholder in placeholders:
            sizes[placeholder] += 1
        return cls(tuple(sizes), tuple(times))


def check_bounds(bounds: Sequence[Sequence[int]], expected: int, *, queries: int) -> None:
    """See that (row, start, end) of the placeholders fit the slices and the queries.

    Raises:
        ValueError: When their number or a length is another.
    """
    if len(bounds) != expected:
        raise ValueError(f"The batch has {expected} slices or packs and {len(bounds)} placeholders.")
    wrong = [bound for bound in bounds if bound[2] - bound[1] != queries]
    if wrong:
        raise ValueError(
            f"image_bound {wrong[0]}: {wrong[0][2] - wrong[0][1]} tokens, expected query_num = {queries} in every "
            "placeholder."
        )


@lru_cache(maxsize=16)
def sine_table(count: int, width: int) -> Tensor:
    """Sines and cosines of the numbers 0 to count - 1, [count, width] fp32: [sin(n w), cos(n w)].

    w_i = 10000 ** (-i / (width / 2)); arithmetic in fp32, as in the released resampler.py.
    """
    rates = np.arange(width // 2, dtype=np.float32) / np.float32(width / 2)
    angles = np.outer(np.arange(count, dtype=np.float32), 1.0 / 10000**rates)
    return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1))


def grid_table(grids: Sequence[tuple[int, int]], width: int, device: torch.device) -> Tensor:
    """The 2-D sine positions of patches, [N, width] fp32: the column's half first, then the row's."""
    columns = torch.cat([torch.arange(wide).repeat(high) for high, wide in grids])
    rows = torch.cat([torch.arange(high).repeat_interleave(wide) for high, wide in grids])
    table = sine_table(max(max(grid) for grid in grids), width // 2).to(device, non_blocking=True)
    columns, rows = columns.to(device, non_blocking=True), rows.to(device, non_blocking=True)
    return torch.cat([table[columns], table[rows]], dim=-1)


class ResamplerAttention(nn.Module):
    """Multi-head attention with torch's fused parameter names, queries shared by all placeholders."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, lengths: Sequence[int]) -> Tensor:
        """[Q, D] queries, [N, D] keys and values of all placeholders -> [P, Q, D]."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        query, key, value = (
            F.linear(states, weight, bias).unflatten(-1, (self.heads, -1))
            for states, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        queries = query.repeat(len(lengths), 1, 1)
        mixed = attend_within_slices(queries, key, value, lengths=lengths, query_length=query.shape[0])
        return self.out_proj(mixed.flatten(1).unflatten(0, (len(lengths), -1)))


class Resampler(nn.Module):
    """Cross attention from learned queries to the patches of each placeholder.

    Key names as released; eps 1e-6 throughout. V-2 adds a frozen sine table to its queries.

    Args:
        queries: Q, a square number (``query_num`` of the checkpoint).
        width: D.
        vision_width: C.
        query_positions: True in V-2.
    """

    def __init__(self, *, queries: int, width: int, vision_width: int, query_positions: bool):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(queries, width))
        self.kv_proj = nn.Linear(vision_width, width, bias=False)
        self.attn = ResamplerAttention(width)
        self.ln_q = nn.LayerNorm(width, eps=1e-6)
        self.ln_kv = nn.LayerNorm(width, eps=1e-6)
        self.ln_post = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Parameter(torch.zeros(width, width))
        if query_positions:
            # Filled by MiniCPMV._init_weights: parameters are made without values while loading.
            self.pos_embed: nn.Parameter | None = nn.Parameter(
                torch.zeros(queries, width), requires_grad=False
            )
        else:
            self.pos_embed = None

    def forward(self, features: Tensor, layout: SliceLayout, packs: FramePacks | None = None) -> Tensor:
        """Give every placeholder its embeddings.

        Args:
            features: [N, C] in the layout's order.
            layout: Where the slices are.
            packs: Frames that share a placeholder; None when every slice has its own.

        Returns:
            [P, Q, D] in the order of the batch.
        """
        value = self.ln_kv(self.kv_proj(features))
        key = value + grid_table(layout.grids, value.shape[-1], value.device).to(value.dtype)
        query = self.ln_q(self.query)
        if self.pos_embed is not None:
            query = query + self.pos_embed
        if packs is None:
            lengths: Sequence[int] = layout.lengths
        else:
            key, value = layout.restore(key), layout.restore(value)
            key, lengths = self._with_times(key, layout, packs)
        mixed = self.attn(query, key, value, lengths=lengths)
        if packs is None:
            mixed = mixed[layout.inverse(mixed.device)]
        return self.ln_post(mixed) @ self.proj

    def _with_times(self, key: Tensor, layout: SliceLayout, packs: FramePacks) -> tuple[Tensor, list[int]]:
        """Add each frame's time to the keys of its patches; give the tokens per placeholder."""
        per_slice = layout.batch_lengths()
        # Row 0 of the table stands for "no time" and is zero.
        table = F.pad(sine_table(max(packs.times) + 1, key.shape[-1]), (0, 0, 1, 0))
        table = table.to(key.device, non_blocking=True)
        rows = torch.tensor(packs.times).repeat_interleave(torch.tensor(per_slice)) + 1
        key = key + table[rows.to(key.device, non_blocking=True)].to(key.dtype)
        sizes = iter(per_slice)
        return key, [sum(next(sizes) for _ in range(size)) for size in packs.sizes]

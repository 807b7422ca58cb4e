"""How MiniCPM-V sees: the towers give one feature vector per patch, the resampler Q embeddings per placeholder.

All slices of a batch go through a tower together, side by side in one row; attention stays inside a slice. Nothing
is padded to the longest slice. Letters: N patches of all slices, L patches of one slice, P placeholders, Q queries
per placeholder, C width of the tower, D width of the LLM.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from minicpm_tune.models.attention import attend_within_slices
from minicpm_tune.models.batch_layout import PATCH, PatchEmbedding, SliceLayout, VisionInput

TABLE_SIDE = 70  # 980 pixels / 14: the position table of the NaViT tower is 70 x 70.
TIMM_TABLE_SIDE = 27
HEAD_WIDTH = 128  # of the resampler
ATTENTION_NAME = "minicpmv_slices"  # the towers' in transformers

# V-2's config.json names its encoder and gives no sizes: (width, blocks, heads, ffn width). The
# small one stands in tests and demo for the real one.
TIMM_ENCODERS = {
    "vit_so400m_patch14_siglip_384.webli": (1152, 27, 16, 4304),
    "vit_minicpmv_tiny_test": (64, 3, 4, 239),
}


def _siglip_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SliceLayout,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Serve transformers' SigLIP attention: [1, heads, N, C / heads] in, [1, N, heads, C / heads] out."""
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    mixed = attend_within_slices(query, key, value, lengths=layout.lengths, scale=scaling)
    return mixed[None], None


AttentionInterface.register(ATTENTION_NAME, _siglip_attention)


@lru_cache(maxsize=4096)
def bucket_positions(rows: int, columns: int) -> np.ndarray:
    """Number the patches of a rows x columns grid in the 70 x 70 position table.

    A patch's row is its fraction of the height, put into one of 70 equal buckets; columns alike.
    The arithmetic follows the released code to the bit: ``i * 70 // n`` differs for n = 25, 49, 50,
    55, 58 and more, because the fractions and the bucket limits are both rounded to fp32.

    Source: released modeling_navit_siglip.py of MiniCPM-V 2.6.

    Args:
        rows: Patches on the slice's height.
        columns: Patches on its width.

    Returns:
        [rows * columns] int64, row-major.
    """
    bucket_rows, bucket_columns = _buckets(rows), _buckets(columns)
    return (bucket_rows[:, None] * TABLE_SIDE + bucket_columns[None, :]).reshape(-1)


@lru_cache(maxsize=1024)
def _buckets(count: int) -> np.ndarray:
    """[count] int64, values 0 to 69: patches along a side, or in 2.5 of a whole slice along one row of the table."""
    step = float(np.float32(1 / count))
    fractions = (np.arange(count, dtype=np.float64) * step).astype(np.float32)
    limits = (1 / TABLE_SIDE + np.arange(TABLE_SIDE - 1) / TABLE_SIDE).astype(np.float32)
    # bucketize(right=True): a fraction equal to a limit belongs to the bucket above it.
    return np.searchsorted(limits, fractions, side="right").astype(np.int64)


class NaViTEmbeddings(nn.Module):
    """Stem and position table of the NaViT tower (key names as released)."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.patch_embedding = PatchEmbedding(3, config.hidden_size, PATCH, stride=PATCH)
        self.position_embedding = nn.Embedding(TABLE_SIDE**2, config.hidden_size)

    def forward(self, patches: Tensor, positions: Tensor) -> Tensor:
        """[N, 588] patches and [N] table rows -> [N, C]."""
        return self.patch_embedding(patches) + self.position_embedding(positions)


class NaViTTower(nn.Module):
    """The SigLIP NaViT tower of 2.5 and later.

    Args:
        config: The checkpoint's ``vision_config``.
        drop_last_layer: ``drop_vision_last_layer`` of the checkpoint.
        positions: ``buckets`` or ``one_row``, see ``model_generations.Generation``.
    """

    def __init__(self, config: SiglipVisionConfig, *, drop_last_layer: bool, positions: str):
        super().__init__()
        config._attn_implementation = ATTENTION_NAME
        self.positions = positions
        self.embeddings = NaViTEmbeddings(config)
        # transformers' annotation names the configuration of the whole SigLIP; its own tower gives it this one.
        self.encoder = SiglipEncoder(config)  # type: ignore[arg-type]
        if drop_last_layer:
            self.encoder.layers = self.encoder.layers[:-1]
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches: Tensor, layout: SliceLayout) -> Tensor:
        """[N, 588] patches in the layout's order -> [N, C] features in the same order.

        In 2.5 a slice shorter than the longest of its sample is padded with zero patches, which
        take part in attention, and the grid is seen as one long row; the released code does so (its
        mask is indexed wrongly), and the weights were trained that way. It is reproduced per sample, as
        inference sees it, so that batching does not change a sample's features.
        """
        kept = None
        if self.positions == "one_row":
            patches, layout, kept = layout.padded_per_sample(patches)
            numbers = [_buckets(length) for length in layout.lengths]
        else:
            numbers = [bucket_positions(*grid) for grid in layout.grids]
        positions = torch.from_numpy(np.concatenate(numbers))
        hidden = self.embeddings(patches, positions.to(patches.device, non_blocking=True))
        # The layout travels in the mask's place, the one argument that transformers hands through to
        # the attention function; see _siglip_attention.
        hidden = self.encoder(hidden[None], attention_mask=layout).last_hidden_state[0]
        hidden = hidden if kept is None else hidden[kept.to(hidden.device, non_blocking=True)]
        return self.post_layernorm(hidden)


class TimmBlock(nn.Module):
    """One pre-norm block with the key names of timm."""

    def __init__(self, width: int, heads: int, ffn_width: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, ffn_width), "fc2": nn.Linear(ffn_width, width)})

    def forward(self, hidden: Tensor, layout: SliceLayout) -> Tensor:
        """[N, C] -> [N, C]."""
        query, key, value = self.attn["qkv"](self.norm1(hidden)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        mixed = attend_within_slices(query, key, value, lengths=layout.lengths)
        hidden = hidden + self.attn["proj"](mixed.flatten(1))
        return hidden + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(hidden))))


class TimmTower(nn.Module):
    """V-2's tower: a SigLIP ViT in timm's form whose 27 x 27 position table is resized per image."""

    _gradient_checkpointing_func: Callable[..., Tensor]  # set by transformers

    def __init__(self, encoder: str, *, drop_last_layer: bool):
        super().__init__()
        if encoder not in TIMM_ENCODERS:
            raise ValueError(
                f"config.json: vision_encoder is {encoder!r}, expected one of {', '.join(TIMM_ENCODERS)}."
            )
        width, blocks, heads, ffn_width = TIMM_ENCODERS[encoder]
        self.width = width
        self.patch_embed = nn.ModuleDict({"proj": PatchEmbedding(3, width, PATCH, stride=PATCH)})
        self.pos_embed = nn.Parameter(torch.zeros(1, TIMM_TABLE_SIDE**2, width))
        self.blocks = nn.ModuleList(
            TimmBlock(width, heads, ffn_width) for _ in range(blocks - int(drop_last_layer))
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.gradient_checkpointing = False

    def forward(self, patches: Tensor, layout: SliceLayout) -> Tensor:
        """[N, 588] patches in the layout's order -> [N, C] features in the same order."""
        hidden = self.patch_embed["proj"](patches) + self._resized_table(layout)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                hidden = self._gradient_checkpointing_func(block, hidden, layout)
            else:
                hidden = block(hidden, layout)
        return self.norm(hidden)

    def _resized_table(self, layout: SliceLayout) -> Tensor:
        table = self.pos_embed.float().reshape(1, TIMM_TABLE_SIDE, TIMM_TABLE_SIDE, -1).permute(0, 3, 1, 2)
        resized = {
            grid: F.interpolate(table, size=grid, mode="bicubic", antialias=True).flatten(2)[0].t()
            for grid in set(layout.grids)
        }
        return torch.cat([resized[grid] for grid in layout.grids]).to(self.pos_embed.dtype)


def check_bounds(vision: VisionInput, *, queries: int) -> None:
    """See that the placeholders fit the slices and the queries.

    Raises:
        ValueError: When their number or a length is another.
    """
    expected = max(vision.placeholders) + 1
    if len(vision.bounds) != expected:
        raise ValueError(f"The batch has {expected} slices or packs and {len(vision.bounds)} placeholders.")
    for row, start, end in vision.bounds:
        if end - start != queries:
            raise ValueError(
                f"image_bound {[row, start, end]}: {end - start} tokens, expected query_num = {queries} in every "
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
        # Filled by MiniCPMV._init_weights: parameters are made without values while loading.
        table = nn.Parameter(torch.zeros(queries, width), requires_grad=False)
        self.pos_embed = table if query_positions else None

    def forward(self, features: Tensor, layout: SliceLayout, temporal_ids: Any = None) -> Tensor:
        """Give every placeholder its embeddings.

        Args:
            features: [N, C] in the layout's order.
            layout: Where the slices are.
            temporal_ids: [S, 2] (placeholder, time or -1 for a still) in the batch's order, where slices share
                placeholders (video of V-4.5); those of one placeholder are neighbors. None: every slice has its own.

        Returns:
            [P, Q, D] in the order of the batch.
        """
        value = self.ln_kv(self.kv_proj(features))
        key = value + grid_table(layout.grids, value.shape[-1], value.device).to(value.dtype)
        query = self.ln_q(self.query)
        if self.pos_embed is not None:
            query = query + self.pos_embed
        if temporal_ids is None:
            mixed = self.attn(query, key, value, lengths=layout.lengths)
            mixed = mixed[torch.tensor(layout.places).to(mixed.device, non_blocking=True)]
        else:
            key, lengths = self._with_times(layout.restore(key), layout.batch_lengths, temporal_ids)
            mixed = self.attn(query, key, layout.restore(value), lengths=lengths)
        return self.ln_post(mixed) @ self.proj

    def _with_times(self, key: Tensor, lengths: Sequence[int], temporal_ids: Any) -> tuple[Tensor, list[int]]:
        """Add each slice's time to the keys of its ``lengths`` patches; give the tokens per placeholder."""
        placeholders, times = zip(*temporal_ids.tolist(), strict=True)
        # Row 0 of the table stands for "no time" and is zero.
        table = F.pad(sine_table(max(times) + 1, key.shape[-1]), (0, 0, 1, 0))
        table = table.to(key.device, non_blocking=True)
        rows = torch.tensor(times).repeat_interleave(torch.tensor(lengths)) + 1
        key = key + table[rows.to(key.device, non_blocking=True)].to(key.dtype)
        tokens: Counter[int] = Counter()
        for placeholder, length in zip(placeholders, lengths, strict=True):
            tokens[placeholder] += length
        return key, list(tokens.values())

"""The vision side of 4.6 and 4.7: the tokens that stand for slices, and what transformers' modules give for them.

transformers loops in Python over slices (and, in the tower's inner merger, over windows of four
patches). That is slow, and under ZeRO-3 it is a deadlock: the merger's layers would be called as
often as a rank has slices, and every call is a collective. The classes here take the place of
transformers' on the same parameters. Letters: N patches or tokens of all slices, S slices, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.vision_utils import get_vision_nearest_position_ids, get_vision_window_index

from minicpm_tune.batch import NewFeatures
from minicpm_tune.checkpoints.model_generations import DOWNSAMPLING
from minicpm_tune.models.attention import attend_within_slices
from minicpm_tune.models.batch_layout import PATCH, Grid, SliceLayout, VisionInput, spans, tower_features


@dataclass(frozen=True)
class PlaceholderRuns:
    """Runs of placeholder tokens, one per slice, in the order of rows and tokens.

    Attributes:
        kinds: [B, T] on the CPU: 0 text, 1 image, 2 video frame.
        grids: [S] (rows, columns) of the slices in patches.
        starts: [S] (row, first token) of the runs.
        lengths: [S] tokens of the runs.
        run_kinds: [S] 1 or 2.
    """

    kinds: Tensor
    grids: tuple[Grid, ...]
    starts: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]
    run_kinds: tuple[int, ...]

    @classmethod
    def of(cls, kinds: Tensor, grids: Sequence[Grid], *, mode: str) -> PlaceholderRuns:
        """Find the runs and hold each against its slice.

        Args:
            kinds: See the class.
            grids: [S] (rows, columns) in patches.
            mode: ``downsample_mode``.

        Raises:
            ValueError: When their numbers or a run's length don't fit the slices.

        Example:
            >>> PlaceholderRuns.of(torch.tensor([[0, 1, 1, 0, 1, 0]]), [(4, 8), (4, 4)], mode="16x").starts
            ((0, 1), (0, 4))
        """
        values, counts = torch.unique_consecutive(F.pad(kinds, (0, 1)).flatten(), return_counts=True)
        firsts = counts.cumsum(0) - counts
        visual = values > 0
        width = kinds.shape[1] + 1
        starts = [divmod(first, width) for first in firsts[visual].tolist()]
        lengths = counts[visual].tolist()
        if len(lengths) != len(grids):
            raise ValueError(
                f"The batch has {len(grids)} slices (tgt_sizes) and {len(lengths)} runs of image tokens in "
                "input_ids. Expected one run per slice; a row that was cut inside an image loses runs."
            )
        per_token = DOWNSAMPLING[mode].patches_per_token
        for (row, start), length, (rows, columns) in zip(starts, lengths, grids, strict=True):
            if length * per_token != rows * columns:
                raise ValueError(
                    f"input_ids, row {row}: the image tokens from {start} on are {length}, expected {rows} x "
                    f"{columns} patches / {per_token} = {rows * columns / per_token:g} (downsample_mode "
                    f"{mode}). The data and the model must use the same downsample_mode."
                )
        return cls(kinds, tuple(grids), tuple(starts), tuple(lengths), tuple(values[visual].tolist()))

    def places(self, width: int) -> Tensor:
        """Places of all placeholder tokens in the flattened [B * T] batch; ``width`` is T."""
        return spans([row * width + start for row, start in self.starts], self.lengths)

    def sizes_of(self, kind: int) -> Tensor:
        """[slices of that kind, 2] (rows, columns) in patches."""
        chosen = [grid for grid, own in zip(self.grids, self.run_kinds, strict=True) if own == kind]
        return torch.tensor(chosen, dtype=torch.int64).view(-1, 2)


class SliceAttention(nn.Module):
    """Attention within slices, for a module that was made as transformers' vision attention.

    Dropout is not applied: the released checkpoints have none.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    num_heads: int
    scaling: float

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int | None = None,
        attention_mask: None = None,
        layout: SliceLayout | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """[1, N, C] -> [1, N, C].

        Args:
            hidden_states: [1, N, C].
            cu_seqlens: [S + 1] ends of the slices, from 0; read only without ``layout``.
            max_seqlen: For the window attention.
            attention_mask: Always None.
            layout: The batch's slices, known on the CPU.
        """
        parts = [
            project(hidden_states[0]).unflatten(-1, (self.num_heads, -1))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        ]
        mixed = self.mix(parts, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, layout=layout)
        return self.out_proj(mixed.flatten(1)[None]), None

    def mix(
        self, parts: list[Tensor], *, cu_seqlens: Tensor, max_seqlen: int | None, layout: SliceLayout | None
    ) -> Tensor:
        """Attend in [N, heads, C / heads]; transformers' window length plays no part."""
        if layout is None:
            lengths = cu_seqlens.diff().tolist()
        else:
            # Behind the inner merger every slice has a fourth of its tokens.
            merged = sum(layout.lengths) // parts[0].shape[0]
            lengths = [length // merged for length in layout.lengths]
        return attend_within_slices(*parts, lengths=lengths, scale=self.scaling)


class WindowAttention(SliceAttention):
    """Attention within windows that all have ``max_seqlen`` patches (the tower's inner merger)."""

    def mix(
        self, parts: list[Tensor], *, cu_seqlens: Tensor, max_seqlen: int | None, layout: SliceLayout | None
    ) -> Tensor:
        """Attend in [N, heads, C / heads]: the windows are one dense batch."""
        query, key, value = (part.unflatten(0, (-1, max_seqlen)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, scale=self.scaling)
        return mixed.transpose(1, 2).flatten(0, 1)


class SliceMerger(nn.Module):
    """The merger in front of the LLM, each of its layers called once for all slices.

    For a module that was made as transformers' merger.
    """

    merge_kernel_size: tuple[int, int]
    merger_times: int
    mlp: nn.ModuleList

    def forward(self, hidden_states: Tensor, target_sizes: Tensor) -> list[Tensor]:
        """Merge neighboring tokens and project them to the LLM's width.

        Args:
            hidden_states: [1, N, C], the slices one after another, tokens row-major.
            target_sizes: [S, 2] (rows, columns) in tokens.

        Returns:
            One tensor [tokens of all slices, LLM width] in a list. transformers' merger gives a tensor per
            slice; but DeepSpeed waits for the other ranks once per tensor that a module gives.
        """
        grids = [(int(rows), int(columns)) for rows, columns in target_sizes.tolist()]
        merged = hidden_states[0]
        down, across = self.merge_kernel_size
        for mlp in self.mlp:
            starts = accumulate((rows * columns for rows, columns in grids), initial=0)
            blocks = torch.cat(
                [
                    start + _block_order(*grid, down, across)
                    for start, grid in zip(starts, grids, strict=False)
                ]
            )
            merged = mlp(merged[blocks.to(merged.device, non_blocking=True)].flatten(1))
            grids = [(rows // down, columns // across) for rows, columns in grids]
        return [merged]


def _block_order(rows: int, columns: int, down: int, across: int) -> Tensor:
    """[blocks, down * across] numbers of the tokens of each block of a row-major grid.

    Example:
        >>> _block_order(2, 4, 2, 2).tolist()
        [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    if rows % down or columns % across:
        raise ValueError(
            f"tgt_sizes: a slice has {rows} x {columns} tokens at the merger, expected multiples "
            f"of {down} x {across}. The data and the model must use the same downsample_mode."
        )
    grid = torch.arange(rows * columns).view(rows // down, down, columns // across, across)
    return grid.transpose(1, 2).reshape(-1, down * across)


def use_slice_modules(model: Any) -> None:
    """Let tower and merger run on all slices at once; parameters stay the same objects.

    Args:
        model: transformers' model of 4.6 or 4.7 without the output layer.
    """
    for layer in model.vision_tower.encoder.layers:
        layer.self_attn.__class__ = SliceAttention
    model.vision_tower.vit_merger.self_attn.__class__ = WindowAttention
    model.merger.__class__ = SliceMerger


def encode_slices(model: Any, vision: VisionInput) -> tuple[Tensor, NewFeatures | None]:
    """Run tower and merger once, on all slices of the batch.

    Args:
        model: transformers' model of 4.6 or 4.7 without the output layer.
        vision: What there is of the slices.

    Returns:
        [tokens of all slices, LLM width], in the batch's order, and the tower's features to be cached. When the
        batch has no slice, a dummy slice is run and none of its tokens given: every rank has the same
        collectives, and every trained parameter gets a gradient (of zeros).
    """
    count = None if vision.grids else 0
    if not vision.grids:
        vision = VisionInput(None, torch.tensor([_smallest_grid(model.config)]))
    layout = SliceLayout.of(vision.grids)
    features, new = tower_features(partial(_run_tower, model), vision, layout, tower=model.vision_tower)
    joined = 1 if model.config.downsample_mode == "4x" else 2  # patches of a token's side behind the tower
    sizes = torch.tensor([(rows // joined, columns // joined) for rows, columns in layout.grids])
    (merged,) = model.merger(features[None], sizes)
    return layout.restore(merged)[:count] + _skipped_merger(model, features), new


def _run_tower(model: Any, pixel_values: Tensor | None, layout: SliceLayout) -> Tensor:
    """[tokens, C] in the layout's order; for None those of a dummy slice."""
    if pixel_values is None:
        rows, columns = _smallest_grid(model.config)
        layout = SliceLayout.of([(rows, columns)])
        pixel_values = torch.zeros((3, PATCH, PATCH * rows * columns), dtype=torch.uint8, device=model.device)
    patches = _normalized(pixel_values, model.vision_tower.dtype, layout)
    return _see(model.vision_tower, patches, layout, merges=model.config.downsample_mode != "4x")


def _see(tower: Any, patches: Tensor, layout: SliceLayout, *, merges: bool) -> Tensor:
    """[1, 3, 14, 14 * N] -> [tokens, C]: the tower's forward, with all indices made before the copy to the device.

    transformers' own copies them while the program waits, and the ends of the slices too, which nothing here reads
    (5.23).
    """
    sizes = torch.tensor(layout.grids)
    positions = get_vision_nearest_position_ids(sizes, tower.embeddings.num_patches_per_side)
    positions = positions.to(patches.device, non_blocking=True)
    hidden = tower.embeddings(patches, target_sizes=sizes, position_ids=positions)
    for index, layer in enumerate(tower.encoder.layers):
        hidden = layer(hidden, None, cu_seqlens=None, layout=layout)
        if merges and index == tower.config.insert_layer_id:
            hidden = _merge_windows(tower.vit_merger, hidden, sizes)
    return tower.post_layernorm(hidden)[0]


def _merge_windows(merger: Any, hidden: Tensor, sizes: Tensor) -> Tensor:
    """The inner merger on slices of [S, 2] sizes in patches, which are on the CPU."""
    window, _ = merger.window_kernel_size
    windows = get_vision_window_index(
        F.pad(sizes, (1, 0), value=1), spatial_merge_size=1, window_size=window, patch_size=1
    )
    places, ends = (part.to(hidden.device, non_blocking=True) for part in windows)
    return merger(hidden, sizes, window_index=places, cu_window_seqlens=ends)


def _smallest_grid(config: Any) -> Grid:
    """The smallest slice that the mergers can join, in patches."""
    window = (1, 1) if config.downsample_mode == "4x" else config.vision_config.window_kernel_size
    rows, columns = (side**config.merger_times for side in config.merge_kernel_size)
    return rows * window[0], columns * window[1]


def _skipped_merger(model: Any, like: Tensor) -> Tensor:
    """A zero that gives the inner merger its gradient of zeros in mode 4x, where nothing uses it."""
    merger = model.vision_tower.vit_merger
    if model.config.downsample_mode != "4x" or not any(p.requires_grad for p in merger.parameters()):
        return like.new_zeros(())
    rows, columns = merger.window_kernel_size
    window = like.new_zeros((1, rows * columns, merger.embed_dim))
    return _merge_windows(merger, window, torch.tensor([[rows, columns]]))[:0].sum()


def _normalized(pixel_values: Tensor, dtype: torch.dtype, layout: SliceLayout) -> Tensor:
    """[3, 14, 14 * N] uint8 in the batch's order -> [1, 3, 14, 14 * N], -1 to 1, in the layout's."""
    if list(layout.order) != sorted(layout.order):
        patches = pixel_values.unflatten(-1, (-1, PATCH)).permute(2, 0, 1, 3)
        pixel_values = layout.arrange(patches).permute(1, 2, 0, 3).flatten(2)
    return ((pixel_values.to(torch.float32) / 255 - 0.5) / 0.5).to(dtype)[None]

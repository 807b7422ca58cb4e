"""The vision side of InternLM-XComposer2: CLIP ViT-L/14 on all images of a batch, then the projector.

Features come out in the order of their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoder

from minicpm_tune.batch import NewFeatures
from minicpm_tune.checkpoints.xcomposer2_geometry import encoded_size, tile_tokens
from minicpm_tune.models.autocast import to_autocast_dtype
from minicpm_tune.models.batch_layout import (
    PATCH,
    Grid,
    PatchEmbedding,
    SliceLayout,
    VisionInput,
    recorded_if_trained,
    tower_features,
)

# The image that stands in when a batch has none: 2 x 2 patches, one token of 4khd.
_DUMMY_PATCHES = 4


def encode_images(model: Any, vision: VisionInput) -> tuple[Tensor, NewFeatures | None]:
    """Run vision tower and projector once, on all images of the batch.

    Args:
        model: An ``XComposer2``.
        vision: What there is of the images.

    Returns:
        [M, D] embeddings in the order of the image tokens, and the tower's features to be cached.
    """
    side, tiles, grids = model.config.side, model.config.tiles, vision.grids
    layout = SliceLayout.of([encoded_size(grid, side) if tiles else grid for grid in grids])
    known = [False] * len(grids) if vision.slice_sources is None else vision.slice_sources.known
    seen = [grid for grid, is_known in zip(grids, known, strict=True) if not is_known]
    features, new = tower_features(partial(_run_tower, model, seen), vision, layout, tower=model.vit)
    features = layout.restore(features)
    if tiles:
        row_end, between = _separators(model)
        features = _in_token_order(
            features.unflatten(0, (-1, side**2)),
            [(rows // side, columns // side) for rows, columns in grids],
            row_end=row_end,
            between=between,
        )
    return model.vision_proj(features), new


def _separators(model: Any) -> tuple[Tensor, Tensor]:
    """[4 C] each: what ends a row, and what stands between the global view and the tiles.

    Both are cut out of one tensor, so that their gradients come in the same order from every batch, one
    without images included. ZeRO-2 adds up the processes' gradients in the order in which they come
    (deepspeed 0.19): where that differs, one parameter gets the other's.
    """
    row_end, between = torch.cat([model.plora_sub_GN.flatten(), model.plora_glb_GN.flatten()]).chunk(2)
    return row_end, between


def _run_tower(model: Any, grids: Sequence[Grid], pixel_values: Tensor | None, layout: SliceLayout) -> Tensor:
    """[N, C] features of images of ``grids`` in the layout's order; for None those of a dummy."""
    if pixel_values is None:
        return _see(model, _dummy_patches(model)).flatten(0, 1)
    dtype = model.vit.tower.embeddings.class_embedding.dtype
    strips = pixel_values.split([PATCH * rows * columns for rows, columns in grids], dim=2)
    images = [as_image(strip, *grid) for strip, grid in zip(strips, grids, strict=True)]
    if model.config.tiles:
        parts = [_cut(normalized(image[None], torch.float32)[0], model.config.side) for image in images]
        patches = torch.cat(parts).to(dtype)
    else:
        patches = _as_patches(normalized(torch.stack(images), dtype))
    return layout.arrange(to_autocast_dtype(_see(model, patches).flatten(0, 1)))


def _see(model: Any, patches: Tensor) -> Tensor:
    """[crops, L, 588] -> [crops, L, C]."""
    with recorded_if_trained(model.vit):
        return model.vit(patches)


def _dummy_patches(model: Any) -> Tensor:
    return model.vit.tower.embeddings.class_embedding.new_zeros(1, _DUMMY_PATCHES, 588)


def encode_dummy(model: Any) -> Tensor:
    """A zero that has run through tower and projector, for a batch without images."""
    features = _see(model, _dummy_patches(model))[0]
    if model.config.tiles:
        features = features.flatten() + sum(_separators(model))
    return model.vision_proj(features).sum() * 0


def check_bounds(vision: VisionInput, *, side: int, tiles: bool) -> None:
    """See that a batch's images and placeholders fit each other and the checkpoint.

    Args:
        vision: What there is of the images.
        side: Patches on the side of the square that the tower sees.
        tiles: Whether an image is several of those squares (4khd).

    Raises:
        ValueError: When they don't.
    """
    if len(vision.bounds) != len(vision.grids):
        raise ValueError(f"The batch has {len(vision.grids)} images and {len(vision.bounds)} placeholders.")
    for (row, start, end), (rows, columns) in zip(vision.bounds, vision.grids, strict=True):
        if tiles:
            fits, expected = rows % side == columns % side == 0, tile_tokens((rows, columns), side)
        else:
            fits, expected = rows == columns == side, side**2
        if not fits:
            raise ValueError(
                f"tgt_sizes: an image has {rows} x {columns} patches, expected "
                f"{'multiples of ' if tiles else ''}{side} x {side}. Make the batch with this checkpoint's rules."
            )
        if end - start != expected:
            raise ValueError(f"image_bound {[row, start, end]}: {end - start} tokens, expected {expected}.")


def _cut(image: Tensor, side: int) -> Tensor:
    """Cut an image into what the tower sees, the global view and then the tiles row by row.

    [3, H, W] normalized pixels in fp32, H and W multiples of a tile's side -> [1 + h * w, n * n, 588] patches.
    """
    length = side * PATCH
    whole = F.interpolate(image[None], size=(length, length), mode="bicubic", align_corners=False)
    tiles = image.unfold(1, length, length).unfold(2, length, length).permute(1, 2, 0, 3, 4).flatten(0, 1)
    return _as_patches(torch.cat([whole, tiles]))


def _as_patches(images: Tensor) -> Tensor:
    """[S, 3, H, W] -> [S, patches, 588], patches row-major."""
    split = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    return split.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def as_image(patches: Tensor, rows: int, columns: int) -> Tensor:
    """[3, 14, 14 * rows * columns] patches side by side -> [3, 14 * rows, 14 * columns]."""
    split = patches.view(3, PATCH, rows, columns, PATCH)
    return split.transpose(1, 2).reshape(3, rows * PATCH, columns * PATCH)


def _in_token_order(
    features: Tensor, grids: Sequence[tuple[int, int]], *, row_end: Tensor, between: Tensor
) -> Tensor:
    """Put the tower's features of all images into the order of their tokens, with the separators.

    [sum of 1 + h * w, n * n, C] as ``_cut`` gives them, (h, w) tiles of each image -> [tokens of all images, 4 C].
    ``row_end`` [4 C] stands behind every row, ``between`` [4 C] between the global view and the tiles.
    """
    merged = _merged(features)
    parts, start = [], 0
    for high, wide in grids:
        whole, *_ = merged[start : start + 1]
        tiles = merged[start + 1 : start + 1 + high * wide].unflatten(0, (high, wide))
        canvas = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # [h * n / 2, w * n / 2, 4 C]
        parts += [_ended(whole, row_end), between[None], _ended(canvas, row_end)]
        start += 1 + high * wide
    return torch.cat(parts)


def _merged(features: Tensor) -> Tensor:
    """[S, n * n, C] -> [S, n / 2, n / 2, 4 C]: 2 x 2 neighbors joined, row by row."""
    side = round(features.shape[1] ** 0.5)
    split = features.view(features.shape[0], side // 2, 2, side // 2, 2, -1)
    return split.transpose(2, 3).flatten(3)


def _ended(rows: Tensor, end: Tensor) -> Tensor:
    """[R, W, 4 C] -> [R * (W + 1), 4 C]."""
    ends = end.to(rows.dtype).expand(rows.shape[0], 1, -1)
    return torch.cat([rows, ends], dim=1).flatten(0, 1)


# openai/clip-vit-large-patch14-336. The released config.json has no sizes of the tower; a small
# checkpoint says its own in ``vision_config``.
CLIP_SIZES = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
}  # fmt: skip
# What CLIP was trained to see, per channel, of pixel values from 0 to 1.
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def clip_config(sizes: dict, *, attention: str) -> CLIPVisionConfig:
    """The configuration of the encoder layers.

    Args:
        sizes: ``vision_config`` of config.json; what it lacks is CLIP ViT-L/14's.
        attention: transformers' attention implementation of the whole model.
    """
    config = CLIPVisionConfig(
        **(CLIP_SIZES | {key: sizes[key] for key in CLIP_SIZES if key in sizes}),
        patch_size=PATCH, hidden_act="quick_gelu", layer_norm_eps=1e-5,
    )  # fmt: skip
    config._attn_implementation = "sdpa" if "flash" in attention else attention
    return config


class CLIPEmbeddings(nn.Module):
    """The stem: patches, the class token in front of them, learned positions."""

    def __init__(self, width: int, positions: int):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = PatchEmbedding(3, width, PATCH, stride=PATCH, bias=False)
        self.position_embedding = nn.Embedding(positions, width)

    def forward(self, patches: Tensor) -> Tensor:
        """[S, L, 588] -> [S, 1 + L, C]."""
        embedded = self.patch_embedding(patches)
        first = self.class_embedding.to(embedded.dtype).expand(embedded.shape[0], 1, -1)
        tokens = torch.cat([first, embedded], dim=1)
        return tokens + self.position_embedding(torch.arange(tokens.shape[1], device=tokens.device))


class CLIPTower(nn.Module):
    """The tower; its features are the last hidden state, without the class token and without the last norm.

    Args:
        config: Sizes of the encoder.
        positions: Rows of the position table: the class token's and one per patch.
    """

    def __init__(self, config: CLIPVisionConfig, positions: int):
        super().__init__()
        self.embeddings = CLIPEmbeddings(config.hidden_size, positions)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # CLIP's spelling
        # transformers' annotation names the configuration of the whole CLIP; its own tower gives it this one.
        self.encoder = CLIPEncoder(config)  # type: ignore[arg-type]
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches: Tensor) -> Tensor:
        """Encode crops that have the same number of patches.

        Args:
            patches: [S, L, 588] normalized pixels in the tower's dtype, patches row-major. Fewer patches than
                the position table has rows take its first ones (the dummy of a batch without images).

        Returns:
            [S, L, C].
        """
        hidden = self.pre_layrnorm(self.embeddings(patches))
        hidden = self.encoder(inputs_embeds=hidden).last_hidden_state
        # The features don't go through the last norm; times zero its weights have a gradient all the same.
        return hidden[:, 1:] + self.post_layernorm(hidden[:, :1]) * 0


class VisionTower(nn.Module):
    """The two wrappers that the released key names come from: ``vit.vision_tower.vision_model``."""

    def __init__(self, config: CLIPVisionConfig, positions: int):
        super().__init__()
        self.vision_tower = nn.Module()
        self.vision_tower.vision_model = CLIPTower(config, positions)

    @property
    def tower(self) -> CLIPTower:
        """The tower itself."""
        return self.vision_tower.vision_model  # type: ignore[return-value]

    def forward(self, patches: Tensor) -> Tensor:
        """As ``CLIPTower.forward``."""
        return self.tower(patches)


def normalized(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [S, 3, ...] -> CLIP's values, in ``dtype``; computed in fp32."""
    shape = (1, 3, *[1] * (pixels.dim() - 2))
    mean, deviation = (
        torch.tensor(values).view(shape).to(pixels.device, non_blocking=True) for values in (MEAN, DEVIATION)
    )
    return ((pixels.to(torch.float32) / 255 - mean) / deviation).to(dtype)


def resized_positions(table: Tensor, side: int) -> Tensor:
    """Resample a position table for another number of patches.

    The class token's row is kept; the others are an image of side x side, resized bicubically. A table that
    fits already is given back as it is.

    Args:
        table: [1 + n * n, C].
        side: Patches on the side of the new image.

    Returns:
        [1 + side * side, C], in the dtype of ``table``.
    """
    if table.shape[0] == 1 + side * side:
        return table
    old = round((table.shape[0] - 1) ** 0.5)
    grid = table[1:].float().view(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], grid.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)])

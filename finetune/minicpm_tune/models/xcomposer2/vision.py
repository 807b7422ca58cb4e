"""The images of an InternLM-XComposer2 batch: through tower and projector at once, in the order of their tokens.

An image comes as one slice. 7b and vl-7b see it as it is. For 4khd it is resized and padded with white to whole
tiles: the tower sees the whole image made small (the *global view*) and every *tile*, all of them squares of the
tower's side, and four neighboring features become one token. The tokens of an image are, in this order: the rows
of the global view, each ended by a row separator; one separator between the views; the rows of all tiles side by
side, each ended by a row separator.

Letters: S images, N features of all images, M image tokens, C width of the tower, D width of the LLM; h x w tiles
of n x n patches (n is 24).
Source: for 4khd ports and documentation of the released code (weaker than the other two models' evidence).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minicpm_tune.batch import NewFeatures
from minicpm_tune.checkpoints.xcomposer2_geometry import encoded_size, tile_tokens
from minicpm_tune.models.slices import (
    PATCH,
    Grid,
    SliceLayout,
    VisionInput,
    to_autocast_dtype,
    tower_features,
)
from minicpm_tune.models.xcomposer2.clip_tower import normalized

# The image that stands in when a batch has none: 2 x 2 patches, one token of 4khd.
_DUMMY_PATCHES = 4


def encode_images(
    model: Any, vision: VisionInput, grids: Sequence[Grid]
) -> tuple[Tensor, NewFeatures | None]:
    """Run vision tower and projector once, on all images of the batch.

    Args:
        model: An ``XComposer2``.
        vision: What there is of the images.
        grids: [S] (rows, columns) of each image, in patches.

    Returns:
        [M, D] embeddings in the order of the image tokens, and the tower's features to be cached.
    """
    side, tiles = model.config.side, model.config.tiles
    layout = SliceLayout.of([encoded_size(grid, side) if tiles else grid for grid in grids])
    seen = list(grids)
    if vision.sources is not None:
        seen = [grid for grid, known in zip(grids, vision.sources.known, strict=True) if not known]
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
    trains = any(parameter.requires_grad for parameter in model.vit.parameters())
    with nullcontext() if trains else torch.no_grad():
        return model.vit(patches)


def _dummy_patches(model: Any) -> Tensor:
    return model.vit.tower.embeddings.class_embedding.new_zeros(1, _DUMMY_PATCHES, 588)


def encode_dummy(model: Any) -> Tensor:
    """A zero that has run through tower and projector, for a batch without images."""
    features = _see(model, _dummy_patches(model))[0]
    if model.config.tiles:
        features = features.flatten() + sum(_separators(model))
    return model.vision_proj(features).sum() * 0


def check_bounds(bounds: Sequence[Sequence[int]], grids: Sequence[Grid], *, side: int, tiles: bool) -> None:
    """See that a batch's images and placeholders fit each other and the checkpoint.

    Args:
        bounds: [S] (row, start, end) of each run of placeholder tokens.
        grids: [S] (rows, columns) of each image, in patches.
        side: Patches on the side of the square that the tower sees.
        tiles: Whether an image is several of those squares (4khd).

    Raises:
        ValueError: When they don't.
    """
    if len(bounds) != len(grids):
        raise ValueError(f"The batch has {len(grids)} images and {len(bounds)} placeholders.")
    for bound, (rows, columns) in zip(bounds, grids, strict=True):
        if tiles:
            fits, expected = rows % side == columns % side == 0, tile_tokens((rows, columns), side)
        else:
            fits, expected = rows == columns == side, side**2
        if not fits:
            raise ValueError(
                f"tgt_sizes: an image has {rows} x {columns} patches, expected "
                f"{'multiples of ' if tiles else ''}{side} x {side}. Make the batch with this checkpoint's rules."
            )
        if bound[2] - bound[1] != expected:
            raise ValueError(f"image_bound {list(bound)}: {bound[2] - bound[1]} tokens, expected {expected}.")


def _cut(image: Tensor, side: int) -> Tensor:
    """Cut an image into what the tower sees.

    Args:
        image: [3, H, W] normalized pixels, fp32; H and W are multiples of a tile's side.
        side: Patches on a tile's side.

    Returns:
        [1 + h * w, n * n, 588] patches: the global view, then the tiles row by row.
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

    Args:
        features: [sum of 1 + h * w, n * n, C], images one after another as ``_cut`` gives them.
        grids: (h, w) tiles of each image.
        row_end: [4 C], the separator behind every row.
        between: [4 C], the separator between the global view and the tiles.

    Returns:
        [tokens of all images, 4 C].
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

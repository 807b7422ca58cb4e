"""The images of an InternLM-XComposer2 batch: through the tower and the projector at once, and where they belong.

Letters: S images, N features of all images, M image tokens, C width of the tower, D width of the LLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minicpm_tune.checkpoints.xcomposer2_geometry import encoded_size, tile_tokens
from minicpm_tune.models.attention import SliceLayout
from minicpm_tune.models.tower_features import (
    Grid,
    VisionInput,
    as_the_next_layer_rounds,
    is_partitioned,
    tower_features,
)
from minicpm_tune.models.xcomposer2 import image_tiles
from minicpm_tune.models.xcomposer2.clip_tower import normalised

# The image that stands in when a batch has none: 2 x 2 patches, one token of 4khd.
_DUMMY_PATCHES = 4


def encode_images(model: Any, vision: VisionInput, grids: Sequence[Grid]) -> Tensor:
    """Run vision tower and projector once, on all images of the batch.

    Args:
        model: An ``XComposer2``.
        vision: The images' pixels, or features that are known already.
        grids: [S] (rows, columns) of each image, in patches.

    Returns:
        [M, D] embeddings in the order of the image tokens.
    """
    side, tiles = model.config.side, model.config.tiles
    layout = SliceLayout.of([encoded_size(grid, side) if tiles else grid for grid in grids])
    sources = vision.sources
    new = (
        grids
        if sources is None
        else [grid for grid, known in zip(grids, sources.known, strict=True) if not known]
    )
    features = layout.restore(
        tower_features(partial(_run_tower, model, new), vision, layout, partitioned=is_partitioned(model.vit))
    )
    if tiles:
        row_end, between = _separators(model)
        features = image_tiles.join(
            features.unflatten(0, (-1, side**2)),
            [(rows // side, columns // side) for rows, columns in grids],
            row_end=row_end,
            between=between,
        )
    return model.vision_proj(features)


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
    strips = pixel_values.split([14 * rows * columns for rows, columns in grids], dim=2)
    images = [image_tiles.as_image(strip, *grid) for strip, grid in zip(strips, grids, strict=True)]
    if model.config.tiles:
        parts = [
            image_tiles.cut(normalised(image[None], torch.float32)[0], model.config.side) for image in images
        ]
        patches = torch.cat(parts).to(dtype)
    else:
        patches = image_tiles.as_patches(normalised(torch.stack(images), dtype))
    return layout.arrange(as_the_next_layer_rounds(_see(model, patches).flatten(0, 1)))


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

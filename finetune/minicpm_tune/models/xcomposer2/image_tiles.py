"""Images of internlm-xcomposer2-4khd-7b on the model's side: tiles, the view of the whole, and their tokens.

An image comes as one slice: resized and padded with white to whole tiles. The tower sees the whole image made
small (the *global view*) and every *tile*, all squares of the tower's side. Four neighbouring features
become one token. The tokens of an image are, in this order: the rows of the global view, each ended by a
row separator; one separator between the views; the rows of all tiles side by side, each ended by a row
separator.

Letters: h x w tiles, n patches on a tile's side (24), C width of the tower.
Source: ports and documentation of the released code (weaker than the other two models' evidence).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minicpm_tune.models.minicpmv.vision import PATCH


def cut(image: Tensor, side: int) -> Tensor:
    """Cut an image into what the tower sees.

    Args:
        image: [3, H, W] normalised pixels, fp32; H and W are multiples of a tile's side.
        side: Patches on a tile's side.

    Returns:
        [1 + h * w, n * n, 588] patches: the global view, then the tiles row by row.
    """
    length = side * PATCH
    whole = F.interpolate(image[None], size=(length, length), mode="bicubic", align_corners=False)
    tiles = image.unfold(1, length, length).unfold(2, length, length).permute(1, 2, 0, 3, 4).flatten(0, 1)
    return as_patches(torch.cat([whole, tiles]))


def as_patches(images: Tensor) -> Tensor:
    """[S, 3, H, W] -> [S, patches, 588], patches row-major."""
    split = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    return split.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def as_image(patches: Tensor, rows: int, columns: int) -> Tensor:
    """[3, 14, 14 * rows * columns] patches side by side -> [3, 14 * rows, 14 * columns]."""
    split = patches.view(3, PATCH, rows, columns, PATCH)
    return split.transpose(1, 2).reshape(3, rows * PATCH, columns * PATCH)


def join(features: Tensor, grids: Sequence[tuple[int, int]], *, row_end: Tensor, between: Tensor) -> Tensor:
    """Put the tower's features of all images into the order of their tokens, with the separators.

    Args:
        features: [sum of 1 + h * w, n * n, C], images one after another as ``cut`` gives them.
        grids: (h, w) of each image.
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
    """[S, n * n, C] -> [S, n / 2, n / 2, 4 C]: 2 x 2 neighbours joined, row by row."""
    side = round(features.shape[1] ** 0.5)
    split = features.view(features.shape[0], side // 2, 2, side // 2, 2, -1)
    return split.transpose(2, 3).flatten(3)


def _ended(rows: Tensor, end: Tensor) -> Tensor:
    """[R, W, 4 C] -> [R * (W + 1), 4 C]."""
    ends = end.to(rows.dtype).expand(rows.shape[0], 1, -1)
    return torch.cat([rows, ends], dim=1).flatten(0, 1)

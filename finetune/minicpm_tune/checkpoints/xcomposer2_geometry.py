"""The sizes of InternLM-XComposer2's images, in patches, features and tokens; data and model both count with them.

The released config.json of 4khd does not state the size of a tile. The stored position table does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minicpm_tune.checkpoints.weight_files import WeightFileError, has_weights, tensor_shape

PATCH = 14  # pixels
# A 4khd tile has CLIP ViT-L/14-336's size, whatever ``img_size`` says there.
TILE_PIXELS = 336
POSITION_TABLE = "vit.vision_tower.vision_model.embeddings.position_embedding.weight"


def position_rows(folder: Path) -> int | None:
    """Rows of the position table in a checkpoint's files; None without weights."""
    if not has_weights(folder):
        return None
    shape = tensor_shape(folder, POSITION_TABLE)
    if shape is None:
        raise WeightFileError(
            f"{folder}: the weights lack {POSITION_TABLE}, expected those of an InternLM-XComposer2 checkpoint. "
            "Download it again."
        )
    return shape[0]


def square_side(config: dict[str, Any], *, tiles: bool, positions: int | None) -> int:
    """Give the side of the square that the vision tower sees, in patches.

    ``img_size`` decides for 7b and vl-7b. For 4khd, where no released code reads it, the stored position
    table does, and without weights at most a tile's 336 pixels.

    Example:
        >>> square_side({"img_size": 490}, tiles=False, positions=1226)
        35
    """
    stored = None if positions is None else round((positions - 1) ** 0.5)
    pixels = config.get("img_size")
    if tiles:
        return stored or min(pixels or TILE_PIXELS, TILE_PIXELS) // PATCH
    return stored if pixels is None and stored else (pixels or TILE_PIXELS) // PATCH


def tile_tokens(size: tuple[int, int], side: int) -> int:
    """Count the tokens of a 4khd image of (rows, columns) patches, a whole number of tiles.

    h x w tiles of side x side patches and the global view give a token for every 2 x 2 patches; a separator
    ends each row of tokens, and one stands between the views.

    Args:
        size: (rows, columns) of the image, in patches.
        side: Patches on a tile's side; even.

    Example:
        >>> tile_tokens((48, 48), 24)
        757
    """
    high, wide, tokens = size[0] // side, size[1] // side, side // 2
    return (high * wide + 1) * tokens**2 + 1 + (high + 1) * tokens


def encoded_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Give the tower's output for an image of (rows, columns) patches, as (crops, features per crop)."""
    return 1 + (size[0] // side) * (size[1] // side), side * side

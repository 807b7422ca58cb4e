"""An image -> what InternLM-XComposer2 sees of it: one square (7b, vl-7b), or tiles (4khd). No torch model.

7b and vl-7b see every image as a square, its aspect not kept. 4khd scales it so that whole tiles of 336 pixels
cover it with little white beside it; the tiles' number is limited by ``hd_num``.

Source: the released preprocessing of 7b and vl-7b; for 4khd ports and documentation of it, which is weaker
evidence. Held against its sizes and pixels by ``tests/data/test_xcomposer2.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from minicpm_tune.checkpoints.xcomposer2_geometry import PATCH, encoded_size
from minicpm_tune.data.slicing.layouts import Bands, Grid, ImageLayout, Size, checked_size, split_bands

WHITE = (255, 255, 255)


@dataclass(frozen=True)
class SquareRules:
    """The rule of 7b and vl-7b: one square.

    Attributes:
        side: Its side, in patches.
        patch_size: Side of a patch, in pixels.

    Example:
        >>> SquareRules(35).layout(1200, 500).tgt_sizes
        [(35, 35)]
    """

    side: int
    patch_size: int = PATCH

    @property
    def max_slice_nums(self) -> int:
        """Images are never cut."""
        return 1

    def layout(self, width: int, height: int) -> ImageLayout:
        """The same for every image; ``RowError`` where a side is below 1."""
        checked_size(width, height)
        pixels = self.side * self.patch_size
        return ImageLayout(Size(pixels, pixels), None, None, self.patch_size)

    def limited(self, max_slice_nums: int) -> SquareRules:
        """The same rule: there is nothing to limit."""
        return self


@dataclass(frozen=True)
class TileLayout(ImageLayout):
    """An image as whole tiles, stored as one slice; the model cuts it and makes the global view.

    Attributes:
        inner: Size of the image inside the white, in pixels.
    """

    grid: Grid
    refined: Size
    inner: Size

    @property
    def tgt_sizes(self) -> list[tuple[int, int]]:
        """(rows, columns) in patches of the whole tiled image."""
        return [(self.refined.height // self.patch_size, self.refined.width // self.patch_size)]

    @property
    def encoded_sizes(self) -> list[tuple[int, int]]:
        """Features of the tower: those of the global view besides those of the tiles."""
        return [encoded_size(size, self.overview.height // self.patch_size) for size in self.tgt_sizes]

    @property
    def cuts(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Where the edges of tiles lie in the image, which has white around it.

        Example:
            >>> TileRules(24, max_slice_nums=16).layout(1000, 400).cuts
            ((0.2, 0.4, 0.6, 0.8), (0.5,))
        """
        return (
            _cuts_inside(self.inner.width, self.refined.width, self.grid.columns),
            _cuts_inside(self.inner.height, self.refined.height, self.grid.rows),
        )

    def slices(self, image: Image.Image) -> Iterator[Bands]:
        """The resized image on white. Portraits are worked on lying on their side, as the released code does."""
        inner, full = self.inner, self.refined
        portrait = image.width < image.height
        if portrait:
            image = image.transpose(Image.Transpose.TRANSPOSE)
            inner, full = Size(inner.height, inner.width), Size(full.height, full.width)
        canvas = Image.new("RGB", full, WHITE)
        resized = image.resize(inner, Image.Resampling.BILINEAR)
        canvas.paste(resized, ((full.width - inner.width) // 2, (full.height - inner.height) // 2))
        if portrait:
            canvas = canvas.transpose(Image.Transpose.TRANSPOSE)
        yield split_bands(canvas)


def _cuts_inside(inner: int, full: int, tiles: int) -> tuple[float, ...]:
    before = (full - inner) // 2
    places = (tile * full // tiles - before for tile in range(1, tiles))
    return tuple(place / inner for place in places if 0 < place < inner)


@dataclass(frozen=True)
class TileRules:
    """The rule of 4khd.

    Attributes:
        side: Side of a tile, in patches.
        max_slice_nums: ``hd_num``, the most tiles; the global view is not counted.
        patch_size: Side of a patch, in pixels.

    Example:
        >>> TileRules(24, max_slice_nums=16).layout(640, 480).tgt_sizes
        [(72, 96)]
    """

    side: int
    max_slice_nums: int
    patch_size: int = PATCH

    def layout(self, width: int, height: int) -> TileLayout:
        """Choose the scale: the most tiles across the longer side with which all tiles stay within the limit."""
        checked_size(width, height)
        long, short = max(width, height), min(width, height)
        across = _tiles_across(long / short, self.max_slice_nums)
        tile = self.side * self.patch_size
        inner_short = max(int(across * tile / (long / short)), 1)
        down = math.ceil(inner_short / tile)
        inner, full = Size(across * tile, inner_short), Size(across * tile, down * tile)
        grid = Grid(columns=across, rows=down)
        if width < height:
            inner, full = Size(inner.height, inner.width), Size(full.height, full.width)
            grid = Grid(columns=down, rows=across)
        return TileLayout(Size(tile, tile), grid, full, self.patch_size, inner)

    def limited(self, max_slice_nums: int) -> TileRules:
        """The same rule with another limit of tiles."""
        return replace(self, max_slice_nums=max_slice_nums)


def _tiles_across(ratio: float, limit: int) -> int:
    """The largest number of tiles across, counted up from 1, that keeps within the limit."""
    across = 1
    while (across + 1) * np.ceil((across + 1) / ratio) <= limit:
        across += 1
    return across

"""The sizes an image is given, and cutting it into patches: integers, Pillow and numpy.

A large image is seen twice: whole and small (the *overview*), and cut into a grid of *slices*, each about as large
as the square the vision encoder was trained on. Every slice is a whole number of *patches* (14 x 14 pixels). Shapes:
H and W are pixels, h and w are patches, L = h * w.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from minicpm_tune.errors import RowError

Bands = list[np.ndarray]


class Grid(NamedTuple):
    """How an image is cut: ``columns`` x ``rows`` slices."""

    columns: int
    rows: int


class Size(NamedTuple):
    """Width and height, in pixels."""

    width: int
    height: int


@dataclass(frozen=True)
class ImageLayout:
    """The sizes an image is given, before any pixel is touched.

    Attributes:
        overview: Size of the whole image as the encoder sees it.
        grid: The arrangement of the slices, or ``None`` when the image is used whole only.
        refined: Size of the image that the slices are cut from; ``None`` without a grid.
        patch_size: Side of a patch, in pixels.
    """

    overview: Size
    grid: Grid | None
    refined: Size | None
    patch_size: int

    @property
    def tgt_sizes(self) -> list[tuple[int, int]]:
        """(rows, columns) in patches of the overview and then of every slice, row by row of the grid."""
        side = self.patch_size
        sizes = [(self.overview.height // side, self.overview.width // side)]
        if self.grid is not None and self.refined is not None:
            slice_rows = self.refined.height // self.grid.rows // side
            slice_columns = self.refined.width // self.grid.columns // side
            sizes += [(slice_rows, slice_columns)] * (self.grid.rows * self.grid.columns)
        return sizes

    @property
    def encoded_sizes(self) -> list[tuple[int, int]]:
        """Two numbers for every slice whose product is how many features the vision tower gives for it."""
        return self.tgt_sizes

    @property
    def count(self) -> int:
        """How many pictures the encoder sees: the overview and the slices."""
        return 1 if self.grid is None else 1 + self.grid.rows * self.grid.columns

    @property
    def cuts(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Where the image is cut, as fractions of its width and of its height.

        Example:
            >>> ImageLayout(Size(448, 448), Grid(columns=2, rows=1), Size(896, 448), 14).cuts
            ((0.5,), ())
        """
        grid = self.grid or Grid(columns=1, rows=1)
        across = tuple(place / grid.columns for place in range(1, grid.columns))
        return across, tuple(place / grid.rows for place in range(1, grid.rows))

    def slices(self, image: Image.Image) -> Iterator[Bands]:
        """Resize and cut an image: the overview, then the slices row by row of the grid."""
        yield split_bands(image.resize(self.overview, Image.Resampling.BICUBIC))
        if self.grid is None or self.refined is None:
            return
        refined = split_bands(image.resize(self.refined, Image.Resampling.BICUBIC))
        cell_height = self.refined.height // self.grid.rows
        cell_width = self.refined.width // self.grid.columns
        for top in range(0, self.refined.height, cell_height):
            for left in range(0, self.refined.width, cell_width):
                yield [band[top : top + cell_height, left : left + cell_width] for band in refined]


class SlicingRules(Protocol):
    """What turns an image's size into a layout; every family has its own in a module beside this one."""

    @property
    def max_slice_nums(self) -> int:
        """Most slices an image is cut into, the overview not counted."""
        ...

    @property
    def patch_size(self) -> int:
        """Side of a patch, in pixels."""
        ...

    def layout(self, width: int, height: int) -> ImageLayout:
        """Decide the layout of an image of this size, in pixels."""
        ...

    def limited(self, max_slice_nums: int) -> SlicingRules:
        """The same rules with another limit of slices."""
        ...


def checked_size(width: int, height: int) -> None:
    """See that an image has pixels.

    Raises:
        RowError: If a side is below 1.
    """
    if width < 1 or height < 1:
        raise RowError(
            "image", f"an image has {width} x {height} pixels, expected at least 1 x 1. Replace the image."
        )


def patch_columns(layout: ImageLayout) -> int:
    """Width of the patch strip of all slices of an image: 14 * sum(L), in pixels."""
    return layout.patch_size * sum(rows * columns for rows, columns in layout.tgt_sizes)


def cut_into_patches(image: Image.Image, layout: ImageLayout, out: np.ndarray) -> None:
    """Resize and cut an image, and write its patches side by side.

    The overview comes first, then the slices row by row of the grid; inside a slice, patches are
    row-major. Values are the resized image's own 0..255.

    Args:
        image: The image, in mode RGB.
        layout: What ``SlicingRules.layout`` gave for this image's size.
        out: Where the patches go: ``[3, 14, 14 * sum(L)]``, uint8.
    """
    assert image.mode == "RGB", image.mode
    assert out.shape[2] == patch_columns(layout), (out.shape, layout)
    start = 0
    for bands in layout.slices(image):
        start = _write_patches(bands, layout.patch_size, out, start)


def split_bands(image: Image.Image) -> Bands:
    """An image's red, green and blue, each ``[H, W]``."""
    return [np.asarray(band) for band in image.split()]


def _write_patches(bands: Bands, side: int, out: np.ndarray, start: int) -> int:
    """Write one slice as patches into ``out`` from column ``start``; give the next column.

    Patches side by side mean that pixel row r of each patch row is one stretch of ``out[channel, r]``, so
    whole pixel rows are copied; going pixel by pixel takes three times as long.
    """
    height, width = bands[0].shape
    end = start + height // side * width
    for channel, band in enumerate(bands):
        target = out[channel, :, start:end].reshape(side, height // side, width)
        np.copyto(target, band.reshape(height // side, side, width).transpose(1, 0, 2))
    return end

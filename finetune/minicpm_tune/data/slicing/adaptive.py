"""An image -> slices -> patches: integers, Pillow and numpy.

A large image is seen twice: whole and small (the *overview*), and cut into a grid of *slices*, each about
as large as the square the vision encoder was trained on. Every slice is a whole number of *patches*
(14 x 14 pixels). Shapes: H and W are pixels, h and w are patches, L = h * w.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from PIL import Image

from minicpm_tune.errors import RowError

Bands = list[np.ndarray]


@dataclass(frozen=True)
class Grid:
    """How an image is cut: ``columns`` x ``rows`` slices."""

    columns: int
    rows: int


@dataclass(frozen=True)
class Size:
    """Width and height, in pixels."""

    width: int
    height: int


@dataclass(frozen=True)
class Layout:
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

    def slices(self, image: Image.Image) -> Iterator[Bands]:
        """Resize and cut an image: the overview, then the slices row by row of the grid."""
        yield _bands(image, self.overview)
        if self.grid is None or self.refined is None:
            return
        refined = _bands(image, self.refined)
        cell_height = self.refined.height // self.grid.rows
        cell_width = self.refined.width // self.grid.columns
        for top in range(0, self.refined.height, cell_height):
            for left in range(0, self.refined.width, cell_width):
                yield [band[top : top + cell_height, left : left + cell_width] for band in refined]


class Rules(Protocol):
    """What turns an image's size into a layout; ``SliceRules`` here, the other models' in their own modules."""

    @property
    def max_slice_nums(self) -> int:
        """Most slices an image is cut into, the overview not counted."""
        ...

    @property
    def patch_size(self) -> int:
        """Side of a patch, in pixels."""
        ...

    def layout(self, width: int, height: int) -> Layout:
        """Decide the layout of an image of this size, in pixels."""
        ...

    def limited(self, max_slice_nums: int) -> Rules:
        """The same rules with another limit of slices."""
        ...


@dataclass(frozen=True)
class SliceRules:
    """The slicing rules of MiniCPM-V 2.0 to 4.5.

    Source: "MiniCPM-V: A GPT-4V Level MLLM on Your Phone" (arXiv:2408.01800), adaptive visual encoding.
    Held against the released code's sizes and pixels by ``tests/test_slicing.py``.

    Attributes:
        max_slice_nums: Most slices an image is cut into, the overview not counted; 1 means never cut.
        scale_resolution: Side of the square the encoder was trained on, in pixels.
        patch_size: Side of a patch, in pixels.

    Example:
        >>> SliceRules().layout(1200, 500).tgt_sizes
        [(21, 50), (29, 35), (29, 35)]
    """

    max_slice_nums: int = 9
    scale_resolution: int = 448
    patch_size: int = 14

    def layout(self, width: int, height: int) -> Layout:
        """Decide how an image is resized and cut.

        Args:
            width: Image width, in pixels; at least 1.
            height: Image height, in pixels; at least 1.

        Returns:
            The sizes of the overview and of the slices.

        Raises:
            RowError: If a side is below 1.
        """
        grid = choose_grid(
            width, height, max_slice_nums=self.max_slice_nums, scale_resolution=self.scale_resolution
        )
        overview = self._best_size(width, height, upscale=grid is None)
        refined = None
        if grid is not None:
            cell = self._best_size(
                _nearest_multiple(width, grid.columns) / grid.columns,
                _nearest_multiple(height, grid.rows) / grid.rows,
                upscale=True,
            )
            refined = Size(cell.width * grid.columns, cell.height * grid.rows)
        return Layout(overview, grid, refined, self.patch_size)

    def limited(self, max_slice_nums: int) -> SliceRules:
        """The same rules with another limit of slices."""
        return replace(self, max_slice_nums=max_slice_nums)

    def _best_size(self, width: float, height: float, *, upscale: bool) -> Size:
        side = self.scale_resolution
        if upscale or width * height > side * side:
            ratio = width / height
            height = int(side / math.sqrt(ratio))
            width = int(height * ratio)
        return Size(_nearest_multiple(width, self.patch_size), _nearest_multiple(height, self.patch_size))


def choose_grid(width: int, height: int, *, max_slice_nums: int, scale_resolution: int) -> Grid | None:
    """Choose how many slices an image is cut into, and in which arrangement.

    The ideal count is the image's area divided by the area the encoder was trained on. Among the
    arrangements with that count, one fewer, or one more, the one whose shape is closest to the image's
    (in log aspect ratio) wins; the earliest candidate wins a tie.

    Source: "MiniCPM-V: A GPT-4V Level MLLM on Your Phone" (arXiv:2408.01800), adaptive visual encoding.

    Args:
        width: Image width, in pixels; at least 1.
        height: Image height, in pixels; at least 1.
        max_slice_nums: Most slices allowed, the overview not counted.
        scale_resolution: Side of the square the encoder was trained on, in pixels.

    Returns:
        The grid, or ``None`` when the image is small enough to be used whole.

    Raises:
        RowError: If a side is below 1.

    Example:
        >>> choose_grid(1344, 896, max_slice_nums=9, scale_resolution=448)
        Grid(columns=3, rows=2)
    """
    checked_size(width, height)
    ideal = min(math.ceil(width * height / scale_resolution**2), max_slice_nums)
    if ideal <= 1:
        return None
    shape = math.log(width / height)
    best, best_error = None, math.inf
    for grid in _candidates(ideal, max_slice_nums):
        error = abs(shape - math.log(grid.columns / grid.rows))
        if error < best_error:
            best, best_error = grid, error
    return best


def checked_size(width: int, height: int) -> None:
    """See that an image has pixels.

    Raises:
        RowError: If a side is below 1.
    """
    if width < 1 or height < 1:
        raise RowError(
            "image", f"an image has {width} x {height} pixels, expected at least 1 x 1. Replace the image."
        )


def _candidates(ideal: int, max_slice_nums: int) -> Iterator[Grid]:
    for count in (ideal - 1, ideal, ideal + 1):
        if count == 1 or count > max_slice_nums:
            continue
        for columns in range(1, count + 1):
            if count % columns == 0:
                yield Grid(columns, count // columns)


def _nearest_multiple(length: float, divisor: int) -> int:
    # Python's round goes half to even; the released code relies on it.
    return max(round(length / divisor) * divisor, divisor)


def patch_columns(layout: Layout) -> int:
    """Width of the patch strip of all slices of an image: 14 * sum(L), in pixels."""
    return layout.patch_size * sum(rows * columns for rows, columns in layout.tgt_sizes)


def cut_into_patches(image: Image.Image, layout: Layout, out: np.ndarray) -> None:
    """Resize and cut an image, and write its patches side by side.

    The overview comes first, then the slices row by row of the grid; inside a slice, patches are
    row-major. Values are the resized image's own 0..255.

    Args:
        image: The image, in mode RGB.
        layout: What ``Rules.layout`` gave for this image's size.
        out: Where the patches go: ``[3, 14, 14 * sum(L)]``, uint8.
    """
    assert image.mode == "RGB", image.mode
    assert out.shape[2] == patch_columns(layout), (out.shape, layout)
    start = 0
    for bands in layout.slices(image):
        start = _write_patches(bands, layout.patch_size, out, start)


def _bands(image: Image.Image, size: Size) -> Bands:
    """The resized image's red, green and blue."""
    return split_bands(image.resize((size.width, size.height), Image.Resampling.BICUBIC))


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

"""The slicing rules of MiniCPM-V and MiniCPM-o: an overview, and slices in a grid that fits the image's shape."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from minicpm_tune.data.slicing.layouts import Grid, ImageLayout, Size, checked_size


@dataclass(frozen=True)
class SliceRules:
    """The slicing rules of MiniCPM-V 2.0 to 4.5.

    Source: "MiniCPM-V: A GPT-4V Level MLLM on Your Phone" (arXiv:2408.01800), adaptive visual encoding.
    Held against the released code's sizes and pixels by ``tests/data/test_slicing.py``.

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

    def layout(self, width: int, height: int) -> ImageLayout:
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
        return ImageLayout(overview, grid, refined, self.patch_size)

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
    counts = [count for count in (ideal - 1, ideal, ideal + 1) if 1 < count <= max_slice_nums]
    grids = [
        Grid(columns, count // columns)
        for count in counts
        for columns in range(1, count + 1)
        if count % columns == 0
    ]
    return min(grids, key=lambda grid: abs(shape - math.log(grid.columns / grid.rows)))


def _nearest_multiple(length: float, divisor: int) -> int:
    # Python's round goes half to even; the released code relies on it.
    return max(round(length / divisor) * divisor, divisor)


@dataclass(frozen=True)
class MergedSliceRules:
    """The slicing rules of MiniCPM-V 4.6 and 4.7 and MiniCPM-OCR, taken from transformers' own image processor.

    Sides are multiples of 4 patches (2 with downsample mode 4x), because the vision tower merges patches before the
    language model sees them. Only the size rules of ``MiniCPMV4_6ImageProcessorPil`` are used; resizing and cutting
    is ``layouts.cut_into_patches``, which gives the same pixels.

    Attributes:
        max_slice_nums: Most slices an image is cut into, the overview not counted; 1 means never cut.
        scale_resolution: Side of the square the encoder was trained on, in pixels.
        patch_size: Side of a patch, in pixels.
        downsample_mode: ``16x`` or ``4x``: patches that become one token.
        upsizes: Whether an image that is not cut is enlarged to ``scale_resolution`` where it is smaller.

    Example:
        >>> MergedSliceRules(max_slice_nums=9).layout(1200, 500).tgt_sizes
        [(20, 48), (28, 36), (28, 36)]
    """

    max_slice_nums: int = 9
    scale_resolution: int = 448
    patch_size: int = 14
    downsample_mode: str = "16x"
    upsizes: bool = True

    def layout(self, width: int, height: int) -> ImageLayout:
        """Decide how an image of this size, in pixels, is resized and cut."""
        checked_size(width, height)
        size = (height, width)
        shared = (self.scale_resolution, self.patch_size, self.downsample_mode)
        cut = _released_sizes().get_sliced_grid(size, self.max_slice_nums, self.scale_resolution)
        whole = _released_sizes().find_best_resize(size, *shared, cut is None and self.upsizes)
        overview = Size(height=whole[0], width=whole[1])
        if cut is None:
            return ImageLayout(overview, None, None, self.patch_size)
        refined = _released_sizes().get_refine_size(size, cut, *shared, True)
        grid = Grid(columns=cut[1], rows=cut[0])
        return ImageLayout(overview, grid, Size(height=refined[0], width=refined[1]), self.patch_size)

    def limited(self, max_slice_nums: int) -> MergedSliceRules:
        """The same rules with another limit of slices."""
        return replace(self, max_slice_nums=max_slice_nums)


@cache
def _released_sizes() -> Any:
    # Imported here: it imports transformers' model package, which the other families don't need.
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    return MiniCPMV4_6ImageProcessorPil()

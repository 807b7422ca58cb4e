"""The slicing rules of MiniCPM-V 4.6 and 4.7, taken from transformers' own image processor.

Both use ``MiniCPMV4_6ImageProcessorPil``: sides are multiples of 4 patches (2 with downsample mode 4x),
because the vision tower merges patches before the language model sees them. Only its size rules
are used here; resizing and cutting is ``slicing.cut_into_patches``, which gives the same pixels.
"""

from __future__ import annotations

from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

from minicpm_tune.data.slicing.adaptive import Grid, Layout, Size, checked_size

PATCHES_PER_TOKEN = {"16x": 16, "4x": 4}


class NativeSliceRules:
    """The slicing rules of 4.6 and 4.7.

    Args:
        max_slice_nums: Most slices an image is cut into, the overview not counted; 1 means never cut.
        scale_resolution: Side of the square the encoder was trained on, in pixels.
        patch_size: Side of a patch, in pixels.
        downsample_mode: ``16x`` or ``4x``: patches that become one token.

    Example:
        >>> NativeSliceRules(max_slice_nums=9).layout(1200, 500).tgt_sizes
        [(20, 48), (28, 36), (28, 36)]
    """

    def __init__(
        self,
        *,
        max_slice_nums: int = 9,
        scale_resolution: int = 448,
        patch_size: int = 14,
        downsample_mode: str = "16x",
    ) -> None:
        self.max_slice_nums = max_slice_nums
        self.scale_resolution = scale_resolution
        self.patch_size = patch_size
        self.downsample_mode = downsample_mode
        self._processor = MiniCPMV4_6ImageProcessorPil()

    def layout(self, width: int, height: int) -> Layout:
        """Decide how an image of this size, in pixels, is resized and cut."""
        checked_size(width, height)
        size = (height, width)
        shared = (self.scale_resolution, self.patch_size, self.downsample_mode)
        cut = self._processor.get_sliced_grid(size, self.max_slice_nums, self.scale_resolution)
        overview_height, overview_width = self._processor.find_best_resize(size, *shared, cut is None)
        overview = Size(overview_width, overview_height)
        if cut is None:
            return Layout(overview, None, None, self.patch_size)
        refined_height, refined_width = self._processor.get_refine_size(size, cut, *shared, True)
        grid = Grid(columns=cut[1], rows=cut[0])
        return Layout(overview, grid, Size(refined_width, refined_height), self.patch_size)

    def limited(self, max_slice_nums: int) -> NativeSliceRules:
        """The same rules with another limit of slices."""
        return NativeSliceRules(
            max_slice_nums=max_slice_nums,
            scale_resolution=self.scale_resolution,
            patch_size=self.patch_size,
            downsample_mode=self.downsample_mode,
        )

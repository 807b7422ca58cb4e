"""The placeholder tokens of a 4.6 / 4.7 batch: which tokens stand for which slice.

Letters: B rows, T tokens, S slices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PATCHES_PER_TOKEN = {"16x": 16, "4x": 4}


@dataclass(frozen=True)
class VisualRuns:
    """Runs of placeholder tokens, one per slice, in the order of rows and tokens.

    Attributes:
        kinds: [B, T] on the CPU: 0 text, 1 image, 2 video frame.
        grids: [S] (rows, columns) of the slices in patches.
        starts: [S] (row, first token) of the runs.
        lengths: [S] tokens of the runs.
        run_kinds: [S] 1 or 2.
    """

    kinds: Tensor
    grids: tuple[tuple[int, int], ...]
    starts: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]
    run_kinds: tuple[int, ...]

    @classmethod
    def of(cls, kinds: Tensor, grids: list[tuple[int, int]], *, mode: str) -> VisualRuns:
        """Find the runs and hold each against its slice.

        Args:
            kinds: See the class.
            grids: [S] (rows, columns) in patches.
            mode: ``downsample_mode``.

        Raises:
            ValueError: When their numbers or a run's length don't fit the slices.

        Example:
            >>> VisualRuns.of(torch.tensor([[0, 1, 1, 0, 1, 0]]), [(4, 8), (4, 4)], mode="16x").starts
            ((0, 1), (0, 4))
        """
        values, counts = torch.unique_consecutive(F.pad(kinds, (0, 1)).flatten(), return_counts=True)
        firsts = counts.cumsum(0) - counts
        visual = values > 0
        width = kinds.shape[1] + 1
        starts = [divmod(first, width) for first in firsts[visual].tolist()]
        lengths = counts[visual].tolist()
        if len(lengths) != len(grids):
            raise ValueError(
                f"The batch has {len(grids)} slices (tgt_sizes) and {len(lengths)} runs of image tokens in "
                "input_ids. Expected one run per slice; a row that was cut inside an image loses runs."
            )
        per_token = PATCHES_PER_TOKEN[mode]
        for (row, start), length, (rows, columns) in zip(starts, lengths, grids, strict=True):
            if length * per_token != rows * columns:
                raise ValueError(
                    f"input_ids, row {row}: the image tokens from {start} on are {length}, expected {rows} x "
                    f"{columns} patches / {per_token} = {rows * columns / per_token:g} (downsample_mode "
                    f"{mode}). The data and the model must use the same downsample_mode."
                )
        return cls(kinds, tuple(grids), tuple(starts), tuple(lengths), tuple(values[visual].tolist()))

    def places(self, width: int) -> Tensor:
        """Places of all placeholder tokens in the flattened [B * T] batch; ``width`` is T."""
        parts = [
            row * width + torch.arange(start, start + length)
            for (row, start), length in zip(self.starts, self.lengths, strict=True)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def sizes_of(self, kind: int) -> Tensor:
        """[slices of that kind, 2] (rows, columns) in patches."""
        chosen = [grid for grid, own in zip(self.grids, self.run_kinds, strict=True) if own == kind]
        return torch.tensor(chosen, dtype=torch.int64).view(-1, 2)

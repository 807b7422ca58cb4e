"""Where things stand in a 4.6 / 4.7 batch: its samples, and the tokens that stand for slices.

Full attention can be kept inside a sample by a mask. A recurrent layer (the gated delta net of 4.6 and
4.7) has no mask: its convolution and its state run on from one sample of a row into the next.
``SpreadLayout`` is the arrangement that stops them. Letters: B rows, T tokens of a row, N real tokens of the
batch, W tokens of a spread row, S slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from minicpm_tune.checkpoints.model_generations import DOWNSAMPLING
from minicpm_tune.models.batch_layout import SampleLayout, placed

# The chunk length of the chunked delta rule (transformers' default): samples start at multiples of it.
CHUNK = 64


@dataclass(frozen=True)
class SpreadLayout(SampleLayout):
    """The samples of a batch, and a spread form of it in which nothing can leak between them.

    In the spread form every sample starts at a multiple of ``CHUNK``, behind at least ``gap`` empty
    tokens; the last token of the gap is where a recurrent state is reset. A row that holds a single
    sample is not spread at all.

    Attributes:
        gap: Fewest empty tokens between two samples; the kernel size of the convolution.
    """

    gap: int

    @cached_property
    def _spread_starts(self) -> tuple[list[list[int]], int]:
        """Where samples start in each spread row, and W."""
        rows, spread_width = [], 0
        for lengths in self.lengths:
            starts: list[int] = []
            end = 0
            for length in lengths:
                start = 0 if not starts else -(-(end + self.gap) // CHUNK) * CHUNK
                starts.append(start)
                end = start + length
            rows.append(starts)
            spread_width = max(spread_width, end)
        return rows, spread_width

    @property
    def spread_width(self) -> int:
        """W, the length of a spread row."""
        return self._spread_starts[1]

    @cached_property
    def slots(self) -> Tensor:
        """[N] place of each real token in the flattened [B * W] spread form."""
        rows, spread_width = self._spread_starts
        places = [
            row * spread_width + start + torch.arange(length)
            for row, starts in enumerate(rows)
            for start, length in zip(starts, self.lengths[row], strict=True)
        ]
        return torch.cat(places).to(self.device, non_blocking=True)

    @cached_property
    def resets(self) -> Tensor:
        """Places in the flattened [B * W] spread form in front of each sample but a row's first."""
        rows, spread_width = self._spread_starts
        places = [row * spread_width + start - 1 for row, starts in enumerate(rows) for start in starts[1:]]
        return torch.tensor(places, dtype=torch.int64).to(self.device, non_blocking=True)

    def spread(self, tokens: Tensor) -> Tensor:
        """[N, ...] -> [B, W, ...], zero between the samples."""
        return placed(tokens, self.slots, len(self.lengths), self.spread_width)

    def collect(self, spread: Tensor) -> Tensor:
        """[B, W, ...] -> [N, ...], what stands between the samples dropped."""
        flat = spread.flatten(0, 1)
        return flat if flat.shape[0] == self.slots.shape[0] else flat[self.slots]


@dataclass(frozen=True)
class PlaceholderRuns:
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
    def of(cls, kinds: Tensor, grids: list[tuple[int, int]], *, mode: str) -> PlaceholderRuns:
        """Find the runs and hold each against its slice.

        Args:
            kinds: See the class.
            grids: [S] (rows, columns) in patches.
            mode: ``downsample_mode``.

        Raises:
            ValueError: When their numbers or a run's length don't fit the slices.

        Example:
            >>> PlaceholderRuns.of(torch.tensor([[0, 1, 1, 0, 1, 0]]), [(4, 8), (4, 4)], mode="16x").starts
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
        per_token = DOWNSAMPLING[mode].patches_per_token
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

"""Where things stand in a 4.6 / 4.7 batch: its samples, and the tokens that stand for slices.

Full attention can be kept inside a sample by a mask. A recurrent layer (the gated delta net of 4.6 and
4.7) has no mask: its convolution and its state run on from one sample of a row into the next.
``SampleLayout`` is the arrangement that stops them. Letters: B rows, T tokens of a row, N real tokens of the
batch, W tokens of a spread row, S slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from minicpm_tune.checkpoints.model_generations import DOWNSAMPLING

# The chunk length of the chunked delta rule (transformers' default): samples start at multiples of it.
CHUNK = 64


@dataclass(frozen=True)
class SampleLayout:
    """The samples of a batch, and a spread form of it in which nothing can leak between them.

    In the spread form every sample starts at a multiple of ``CHUNK``, behind at least ``gap`` empty
    tokens; the last token of the gap is where a recurrent state is reset. A row that holds a single
    sample is not spread at all.

    Attributes:
        lengths: Per row, the lengths of its samples in order; padding is no sample.
        width: T, the length of the padded rows.
        gap: Fewest empty tokens between two samples; the kernel size of the convolution.
        device: Where the index tensors go.
    """

    lengths: tuple[tuple[int, ...], ...]
    width: int
    gap: int
    device: torch.device

    @classmethod
    def of(cls, position_ids: Tensor | None, mask: Tensor, *, gap: int, device: torch.device) -> SampleLayout:
        """Read the samples off the positions.

        Args:
            position_ids: [B, T] on the CPU, restarting at 0 in each sample; None: a row is a sample.
            mask: [B, T] on the CPU, nonzero at real tokens, which stand on the left.
            gap: See the class.
            device: See the class.

        Raises:
            ValueError: When a row is padded on the left or in the middle.

        Example:
            >>> positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
            >>> mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
            >>> SampleLayout.of(positions, mask, gap=4, device=torch.device("cpu")).lengths
            ((3, 2),)
        """
        real = mask.bool()
        padded = (~real[:, :-1] & real[:, 1:]).any(dim=1)
        if padded.any():
            raise ValueError(
                f"attention_mask, row {int(padded.nonzero()[0])}: found padding before a real token, "
                "expected rows padded on the right. Left padding is for generate() alone."
            )
        starts = torch.zeros_like(real) if position_ids is None else position_ids == 0
        lengths = []
        for row_starts, count in zip(starts, real.sum(dim=1).tolist(), strict=True):
            first = [0, *(index for index in row_starts[:count].nonzero()[:, 0].tolist() if index)]
            lengths.append(tuple(end - start for start, end in zip(first, [*first[1:], count], strict=True)))
        return cls(tuple(lengths), mask.shape[1], gap, device)

    @property
    def packed(self) -> bool:
        """Whether a row holds more than one sample."""
        return any(len(row) > 1 for row in self.lengths)

    @property
    def samples(self) -> list[int]:
        """Lengths of all samples, row by row."""
        return [length for row in self.lengths for length in row]

    def as_one_row(self) -> SampleLayout:
        """The same samples behind one another in a single row without padding."""
        samples = tuple(self.samples)
        return SampleLayout((samples,), sum(samples), self.gap, self.device)

    @cached_property
    def tokens(self) -> Tensor:
        """[N] place of each real token in the flattened [B * T] batch."""
        places = [row * self.width + torch.arange(sum(lengths)) for row, lengths in enumerate(self.lengths)]
        return torch.cat(places).to(self.device, non_blocking=True)

    @cached_property
    def positions(self) -> Tensor:
        """[N] position of each real token in its sample."""
        return torch.cat([torch.arange(length) for length in self.samples]).to(self.device, non_blocking=True)

    @cached_property
    def ends(self) -> Tensor:
        """[samples + 1] int32, where the samples end among the N real tokens, from 0."""
        ends = torch.tensor([0, *self.samples]).cumsum(0).to(torch.int32)
        return ends.to(self.device, non_blocking=True)

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

    def take(self, batch: Tensor) -> Tensor:
        """[B, T, ...] -> [N, ...], the real tokens."""
        flat = batch.flatten(0, 1)
        return flat if flat.shape[0] == self.tokens.shape[0] else flat[self.tokens]

    def put(self, tokens: Tensor) -> Tensor:
        """[N, ...] -> [B, T, ...], zero at the padding."""
        return _placed(tokens, self.tokens, len(self.lengths), self.width)

    def spread(self, tokens: Tensor) -> Tensor:
        """[N, ...] -> [B, W, ...], zero between the samples."""
        return _placed(tokens, self.slots, len(self.lengths), self.spread_width)

    def collect(self, spread: Tensor) -> Tensor:
        """[B, W, ...] -> [N, ...], what stands between the samples dropped."""
        flat = spread.flatten(0, 1)
        return flat if flat.shape[0] == self.slots.shape[0] else flat[self.slots]


def _placed(tokens: Tensor, places: Tensor, rows: int, width: int) -> Tensor:
    if tokens.shape[0] == rows * width:
        return tokens.unflatten(0, (rows, width))
    empty = tokens.new_zeros((rows * width, *tokens.shape[1:]))
    return empty.index_copy(0, places, tokens).unflatten(0, (rows, width))


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

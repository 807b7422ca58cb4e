"""The samples of a batch: which tokens are real, and the one row without padding that the LLM runs on.

Letters: B rows of T tokens, N real tokens of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleLayout:
    """Where the samples of a padded or packed batch stand.

    Attributes:
        lengths: Per row, the lengths of its samples in order; padding is no sample.
        width: T, the length of the padded rows.
        device: Where the index tensors go.
    """

    lengths: tuple[tuple[int, ...], ...]
    width: int
    device: torch.device

    @classmethod
    def of(cls, position_ids: Tensor | None, mask: Tensor, *, device: torch.device, **more: Any) -> Any:
        """Read the samples off the positions.

        Args:
            position_ids: [B, T] on the CPU, restarting at 0 in each sample; None: a row is a sample.
            mask: [B, T] on the CPU, nonzero at real tokens, which stand on the left.
            device: See the class.
            **more: Further attributes of a subclass.

        Raises:
            ValueError: When a row is padded on the left or in the middle.

        Example:
            >>> positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
            >>> mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
            >>> SampleLayout.of(positions, mask, device=torch.device("cpu")).lengths
            ((3, 2),)
        """
        real = mask.bool()
        padded = (~real[:, :-1] & real[:, 1:]).any(dim=1)
        if padded.any():
            raise ValueError(
                f"attention_mask, row {int(padded.nonzero()[0])}: found padding before a real token, expected rows "
                "padded on the right. Left padding is for generate() alone."
            )
        starts = torch.zeros_like(real) if position_ids is None else position_ids == 0
        lengths = []
        for row_starts, count in zip(starts, real.sum(dim=1).tolist(), strict=True):
            first = [0, *(index for index in row_starts[:count].nonzero()[:, 0].tolist() if index)]
            lengths.append(tuple(end - start for start, end in zip(first, [*first[1:], count], strict=True)))
        return cls(tuple(lengths), mask.shape[1], device, **more)

    @classmethod
    def of_batch(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        on_cpu: Any,
        **more: Any,
    ) -> Any:
        """Read the samples of a model's arguments.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 1 at real tokens; None: there is no padding.
            position_ids: [B, T], restarting at 0 in each packed sample; None: a row is a sample.
            on_cpu: ``Batch.on_cpu``; without it, mask and positions are fetched, and the program waits for the device.
            **more: See ``of``.
        """
        if on_cpu is not None:
            mask, *positions = torch.from_numpy(on_cpu[1:])
        else:
            mask = torch.ones(input_ids.shape) if attention_mask is None else attention_mask.cpu()
            positions = [] if position_ids is None else [position_ids.cpu()]
        return cls.of(positions[0] if positions else None, mask, device=input_ids.device, **more)

    @property
    def samples(self) -> list[int]:
        """Lengths of all samples, row by row."""
        return [length for row in self.lengths for length in row]

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

    def take(self, batch: Tensor) -> Tensor:
        """[B, T, ...] -> [N, ...], the real tokens."""
        flat = batch.flatten(0, 1)
        return flat if flat.shape[0] == self.tokens.shape[0] else flat[self.tokens]

    def put(self, tokens: Tensor) -> Tensor:
        """[N, ...] -> [B, T, ...], zero at the padding."""
        return placed(tokens, self.tokens, len(self.lengths), self.width)

    def rank(self, places: Tensor) -> Tensor:
        """Places of real tokens in the flattened [B * T] batch -> their places among the N real tokens."""
        ranks = self.tokens.new_zeros(len(self.lengths) * self.width)
        return ranks.index_copy(0, self.tokens, torch.arange(len(self.tokens), device=self.device))[places]


def placed(tokens: Tensor, places: Tensor, rows: int, width: int) -> Tensor:
    """[N, ...] -> [rows, width, ...], every token at its place and zero elsewhere."""
    if tokens.shape[0] == rows * width:
        return tokens.unflatten(0, (rows, width))
    empty = tokens.new_zeros((rows * width, *tokens.shape[1:]))
    return empty.index_copy(0, places, tokens).unflatten(0, (rows, width))

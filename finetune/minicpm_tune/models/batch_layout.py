"""How a batch lies in memory: the slices of its images side by side, and its samples as one row without padding.

With ``--cache_vision_features`` a sample holds the tower's features of the images that were seen before, and the
pixels of the others alone. Letters: S slices with N patches or feature tokens together, C width of the tower;
B rows of T tokens, of which N are real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from minicpm_tune.batch import NewFeatures, SliceSources

PATCH = 14  # pixels on a patch's side, in every tower
Grid = tuple[int, int]
FULL_SLICE: Grid = (32, 32)  # patches of a slice as large as the towers were trained on, 448 pixels


class PatchEmbedding(nn.Conv2d):
    """The stem convolution of a tower, applied to patches that are cut out already.

    Stride and kernel are both the patch side, so the convolution is one linear map per patch.
    """

    def forward(self, patches: Tensor) -> Tensor:
        """[..., 3 * 14 * 14] -> [..., C]."""
        return F.linear(patches, self.weight.flatten(1), self.bias)


@dataclass(frozen=True)
class SliceLayout:
    """The slices of a batch, ordered so that those of equal length are neighbors.

    Equal lengths side by side turn attention within slices into a few dense batches (views, no
    copies) where there is no variable-length kernel.

    Attributes:
        grids: [S] (rows, columns) in patches, in the layout's order.
        lengths: [S] tokens per slice, in the layout's order.
        order: [S] which slice of the batch stands at each place of the layout.
        samples: [S] number of the sample each slice belongs to, in the layout's order.
    """

    grids: tuple[Grid, ...]
    lengths: tuple[int, ...]
    order: tuple[int, ...]
    samples: tuple[int, ...]

    @classmethod
    def of(cls, grids: Sequence[Grid], samples: Sequence[int] | None = None) -> SliceLayout:
        """Order slices given in the batch's order by their length.

        Args:
            grids: [S] (rows, columns) in patches.
            samples: [S] sample of each slice; needed only by the 2.5 tower.
        """
        order = sorted(range(len(grids)), key=lambda index: grids[index][0] * grids[index][1])
        ordered = tuple(grids[index] for index in order)
        return cls(
            grids=ordered,
            lengths=tuple(rows * columns for rows, columns in ordered),
            order=tuple(order),
            samples=tuple(0 if samples is None else samples[index] for index in order),
        )

    @cached_property
    def places(self) -> list[int]:
        """[S] where each slice of the batch stands in the layout."""
        return sorted(range(len(self.order)), key=self.order.__getitem__)

    @property
    def batch_lengths(self) -> list[int]:
        """[S] tokens per slice, in the batch's order."""
        return [self.lengths[place] for place in self.places]

    def arrange(self, tokens: Tensor) -> Tensor:
        """Bring [N, ...] tokens from the batch's order into the layout's."""
        pieces = tokens.split(self.batch_lengths)
        return torch.cat([pieces[index] for index in self.order])

    def pieces(self, tokens: Tensor) -> list[Tensor]:
        """[N, ...] in the layout's order -> the tokens of each slice, in the batch's order."""
        pieces = _split(tokens, self.lengths)
        return [pieces[place] for place in self.places]

    def restore(self, tokens: Tensor) -> Tensor:
        """Bring [N, ...] tokens from the layout's order back into the batch's."""
        return torch.cat(self.pieces(tokens))

    def padded_per_sample(self, tokens: Tensor) -> tuple[Tensor, SliceLayout, Tensor]:
        """Pad every slice with zero tokens to the longest of its sample (the 2.5 quirk).

        Returns:
            The padded tokens, their layout (grids of the real patches), and [N] indices of the real
            tokens among them.
        """
        longest = dict(
            zip(self.samples, self.lengths, strict=True)
        )  # the last of a sample, by the layout's order
        lengths = tuple(longest[sample] for sample in self.samples)
        padded = [
            F.pad(piece, (0, 0, 0, full - piece.shape[0]))
            for piece, full in zip(tokens.split(list(self.lengths)), lengths, strict=True)
        ]
        return torch.cat(padded), replace(self, lengths=lengths), first_of_each(lengths, self.lengths)


def _split(tokens: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]:
    """Cut [N, ...] into slices of so many patches; in 4.6 and 4.7 a token is several patches joined."""
    joined = sum(lengths) // tokens.shape[0]
    return tokens.split([length // joined for length in lengths])


@dataclass(frozen=True)
class VisionInput:
    """What a batch has of its slices: the keys of a ``batch.Batch``, sizes and bounds best on the CPU.

    Attributes:
        pixel_values: [3, 14, 14 * patches] uint8, patches side by side, of the slices that are not cached.
        tgt_sizes: [S, 2] (rows, columns) of all slices, in patches; tensor or array, as the next two.
        image_bound: [P, 3] (row, start, end) of the runs of placeholder tokens.
        temporal_ids: [S, 2] (placeholder, time or -1) where slices share placeholders; None: every slice has its own.
        slice_sources: Which slices' features are cached; None: none.
        known_features: [tokens, C] of the cached slices, as the tower gave them.
    """

    pixel_values: Tensor | None = None
    tgt_sizes: Any = None
    image_bound: Any = None
    temporal_ids: Any = None
    slice_sources: SliceSources | None = None
    known_features: Tensor | None = None

    @cached_property
    def grids(self) -> list[Grid]:
        """[S] (rows, columns) of all slices, in patches."""
        return (
            [] if self.tgt_sizes is None else [(rows, columns) for rows, columns in self.tgt_sizes.tolist()]
        )

    @cached_property
    def bounds(self) -> list[list[int]]:
        """[P] (row, start, end) of the runs of placeholder tokens."""
        return [] if self.image_bound is None else self.image_bound.tolist()

    @property
    def placeholders(self) -> list[int]:
        """[S] the placeholder of each slice."""
        if self.temporal_ids is None:
            return list(range(len(self.grids)))
        return [int(placeholder) for placeholder in self.temporal_ids[:, 0].tolist()]

    def places(self, width: int) -> Tensor:
        """[tokens] places of all placeholder tokens in the flattened [B * T] batch; ``width`` is T."""
        starts = [row * width + start for row, start, _ in self.bounds]
        return spans(starts, [end - start for _, start, end in self.bounds])


def tower_features(
    run: Callable[[Tensor | None, SliceLayout], Tensor],
    vision: VisionInput,
    layout: SliceLayout,
    *,
    tower: nn.Module,
) -> tuple[Tensor, NewFeatures | None]:
    """Give the tower's features of all slices, running it only on those that are not cached.

    Args:
        run: Gives [tokens, C] in the layout's order for pixels and their layout. For None and any layout it
            runs the tower on a dummy slice, and its result is not used.
        vision: What there is of the slices.
        layout: All slices of the batch.
        tower: The tower's module. Where ZeRO-3 or FSDP has partitioned it, running it is a collective, and a
            process without anything to run must take part.

    Returns:
        [N, C] in the layout's order, and those that can be cached now.
    """
    sources = vision.slice_sources
    if sources is None:
        return run(vision.pixel_values, layout), None
    slices = [(layout.grids[place], layout.samples[place]) for place in layout.places]
    unknown = [part for part, known in zip(slices, sources.known, strict=True) if not known]
    found: list[Tensor] = []
    if unknown:
        part = SliceLayout.of(*zip(*unknown, strict=True))
        found = part.pieces(run(vision.pixel_values, part))
    elif _is_partitioned(tower):
        run(None, layout)
    pieces = found
    if vision.known_features is not None:
        known_grids = [grid for (grid, _), known in zip(slices, sources.known, strict=True) if known]
        known_pieces = _split(vision.known_features, [rows * columns for rows, columns in known_grids])
        old, new = iter(known_pieces), iter(found)
        pieces = [next(old if known else new) for known in sources.known]
    return torch.cat([pieces[index] for index in layout.order]), _by_picture(found, sources.keys)


def _is_partitioned(tower: nn.Module) -> bool:
    zero3 = any(hasattr(parameter, "ds_id") for parameter in tower.parameters())
    return zero3 or any(isinstance(module, FSDPModule) for module in tower.modules())


def _by_picture(slices: list[Tensor], keys: list[tuple[str | None, int]]) -> NewFeatures:
    rest = iter(slices)
    return NewFeatures([(key, torch.cat([next(rest) for _ in range(count)]).detach()) for key, count in keys])


def recorded_if_trained(module: nn.Module) -> AbstractContextManager:
    """In it autograd records a module's run only where some of its parameters train."""
    trains = any(parameter.requires_grad for parameter in module.parameters())
    return nullcontext() if trains else torch.no_grad()


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
    def of_batch(cls, on_cpu: Tensor, *, device: torch.device, **more: Any) -> Any:
        """Read the samples off ``Batch.on_cpu``, [2 or 3, B, T]; the rest as for ``of``."""
        _, mask, *positions = on_cpu
        return cls.of(positions[0] if positions else None, mask, device=device, **more)

    @property
    def samples(self) -> list[int]:
        """Lengths of all samples, row by row."""
        return [length for row in self.lengths for length in row]

    @cached_property
    def tokens(self) -> Tensor:
        """[N] place of each real token in the flattened [B * T] batch."""
        starts = range(0, len(self.lengths) * self.width, self.width)
        return spans(starts, [sum(lengths) for lengths in self.lengths]).to(self.device, non_blocking=True)

    @cached_property
    def positions(self) -> Tensor:
        """[N] position of each real token in its sample."""
        return spans([0] * len(self.samples), self.samples).to(self.device, non_blocking=True)

    @cached_property
    def sample_of_token(self) -> Tensor:
        """[N] number of the sample that each real token belongs to, counted over all rows."""
        numbers = torch.arange(len(self.samples)).repeat_interleave(torch.tensor(self.samples))
        return numbers.to(self.device, non_blocking=True)

    @cached_property
    def ends(self) -> Tensor:
        """[samples + 1] int32, where the samples end among the N real tokens, from 0."""
        return ends_of(self.samples, self.device)

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


def replaced(embeddings: Tensor, places: Tensor, features: Tensor) -> Tensor:
    """[B, T, D] with the rows [K, D] of ``features`` at the [K] places, counted in the flattened [B * T] batch."""
    places = places.to(embeddings.device, non_blocking=True)
    return embeddings.flatten(0, 1).index_copy(0, places, features.to(embeddings.dtype)).view_as(embeddings)


def spans(starts: Iterable[int], lengths: Iterable[int]) -> Tensor:
    """[sum(lengths)] int64: start, start + 1, ... of every span.

    Example:
        >>> spans([0, 5], [3, 1]).tolist()
        [0, 1, 2, 5]
    """
    ranges = (torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True))
    return torch.cat([torch.zeros(0, dtype=torch.int64), *ranges])


def first_of_each(lengths: Iterable[int], counts: Iterable[int]) -> Tensor:
    """Places of the first ``counts`` tokens of every part, where parts of ``lengths`` stand side by side.

    Example:
        >>> first_of_each([3, 4], [2, 1]).tolist()
        [0, 1, 3]
    """
    return spans(list(accumulate(lengths, initial=0))[:-1], counts)


def ends_of(lengths: Iterable[int], device: torch.device) -> Tensor:
    """[parts + 1] int32, where the parts end that stand side by side, from 0."""
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32).to(device, non_blocking=True)

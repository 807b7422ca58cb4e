"""Slices whose vision features are known before the vision tower runs, and running it on the others.

With ``--cache_vision_features`` (see ``data/vision_cache.py``) a sample brings the tower's features of the images
that were seen before, and the pixels of the others. Letters: S slices, N feature tokens of all slices, C
width of the tower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from minicpm_tune.batch import SliceSources
from minicpm_tune.models.attention import SliceLayout

Grid = tuple[int, int]


@dataclass(frozen=True)
class VisionInput:
    """What a batch has of its slices.

    Attributes:
        pixel_values: [3, 14, 14 * patches] uint8, patches of the slices side by side, known ones left out.
        sources: Which slices' features are known, as the tower gave them; None: none.
        known_features: Those features, [tokens, C].
    """

    pixel_values: Tensor | None
    sources: SliceSources | None = None
    known_features: Tensor | None = None


def tower_features(
    run: Callable[[Tensor | None, SliceLayout], Tensor],
    vision: VisionInput,
    layout: SliceLayout,
    *,
    partitioned: bool,
) -> Tensor:
    """The tower's features of all slices, running it only on those that are not known.

    Args:
        run: Gives [tokens, C] in the layout's order for pixels and their layout; for None and any layout it
            runs the tower on a dummy slice, and what it gives is not used.
        vision: What there is of the slices.
        layout: All slices of the batch.
        partitioned: Whether the tower's weights are divided over processes (ZeRO-3). Running it then is a
            collective, in which a process without anything to run must take part.

    Returns:
        [N, C] in the layout's order.
    """
    sources, known_features = vision.sources, vision.known_features
    if sources is None:
        return run(vision.pixel_values, layout)
    grids, samples = layout.in_batch_order()
    chosen = np.flatnonzero(~sources.known).tolist()
    found: list[Tensor] = []
    if chosen:
        part = SliceLayout.of([grids[index] for index in chosen], [samples[index] for index in chosen])
        features = run(vision.pixel_values, part)
        # In 4.6 and 4.7 the tower joins four patches to a token.
        merged = sum(part.lengths) // features.shape[0]
        found = list(features.split([length // merged for length in part.lengths]))
        found = [found[place] for place in part.places()]
        sources.found = _by_picture(found, sources.keys)
    elif partitioned:
        run(None, layout)
    if known_features is None:
        pieces = found
    else:
        lengths = [
            rows * columns for (rows, columns), known in zip(grids, sources.known, strict=True) if known
        ]
        merged = sum(lengths) // known_features.shape[0]
        known = iter(known_features.split([length // merged for length in lengths]))
        new = iter(found)
        pieces = [next(known) if is_known else next(new) for is_known in sources.known]
    return torch.cat([pieces[index] for index in layout.order])


def _by_picture(slices: list[Tensor], keys: list[tuple[str | None, int]]) -> list[Tensor]:
    rest = iter(slices)
    return [torch.cat([next(rest) for _ in range(count)]).detach() for _, count in keys]


def as_the_next_layer_rounds(features: Tensor) -> Tensor:
    """Under autocast: what the layer behind the tower would round to; what is kept is then half as large."""
    device = features.device.type
    autocast = not features.is_meta and torch.is_autocast_enabled(device)
    return features.to(torch.get_autocast_dtype(device)) if autocast else features


def is_partitioned(module: nn.Module) -> bool:
    """Whether ZeRO-3 holds a module's weights in shares."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())

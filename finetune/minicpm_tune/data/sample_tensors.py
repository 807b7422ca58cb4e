"""The tensors of a sample that follow from its pictures and layouts.

Shapes: T is the length in tokens, S the slices, L a slice's patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from minicpm_tune.data.media.opened_media import Picture
from minicpm_tune.data.placeholders import PlaceholderStyle
from minicpm_tune.data.slicing.adaptive import Layout, cut_into_patches, patch_columns


def patches_of(
    pictures: Sequence[Picture], layouts: Sequence[tuple[Layout, ...]], patch_size: int
) -> torch.Tensor:
    """Decode the pictures: the patches of all slices side by side, uint8 ``[3, 14, 14 * sum(L)]``."""
    total = sum(patch_columns(layout) for frames in layouts for layout in frames)
    pixels = np.empty((3, patch_size, total), dtype=np.uint8)
    start = 0
    for picture, frames in zip(pictures, layouts, strict=True):
        for image, layout in zip(picture.frames(), frames, strict=True):
            end = start + patch_columns(layout)
            cut_into_patches(image, layout, pixels[:, :, start:end])
            start = end
    return torch.from_numpy(pixels)


def token_types(
    input_ids: torch.Tensor, tokenizer: PreTrainedTokenizerFast, style: PlaceholderStyle
) -> torch.Tensor:
    """0 for text, 1 for image tokens, 2 for video tokens ``[T]``, as transformers' processor of 4.7 gives."""
    types = torch.zeros_like(input_ids)
    types[input_ids == tokenizer.convert_tokens_to_ids(style.pad)] = 1
    types[input_ids == tokenizer.convert_tokens_to_ids(style.video_pad)] = 2
    return types


def temporal_ids(pictures: Sequence[Picture], layouts: Sequence[tuple[Layout, ...]]) -> torch.Tensor:
    """Of every slice the run of pad tokens it belongs to and its time index, -1 for stills, ``[S, 2]``."""
    return torch.tensor(list(_run_and_time(pictures, layouts)), dtype=torch.int64).reshape(-1, 2)


def _run_and_time(
    pictures: Sequence[Picture], layouts: Sequence[tuple[Layout, ...]]
) -> Iterator[tuple[int, int]]:
    """For every slice, the run it belongs to and its time index, -1 for stills.

    Packed frames are never cut (their rules say one slice), so a frame is a slice.
    """
    run = 0
    for picture, frames in zip(pictures, layouts, strict=True):
        if picture.packs is None:
            for _ in (size for layout in frames for size in layout.tgt_sizes):
                yield run, -1
                run += 1
            continue
        for pack in picture.packs:
            for time in pack:
                yield run, time
            run += 1

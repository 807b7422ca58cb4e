"""What passes from the data side to the model: samples, batches, and where a batch came from.

The data side makes these, the models read them, and neither imports the other. Letters: B rows of T tokens; S
slices; P runs of pad tokens that stand for slices (a pack of video frames shares one run); L patches of a slice;
C width of the vision tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a token that is not supervised; torch's default for cross entropy."""

Origin = tuple[int, int]
"""(source, row): the number of a data file in the run, and of a row in that file, both counted from 0."""


@dataclass(frozen=True)
class PictureFeatures:
    """What the vision cache knows of one image or video of a sample.

    Attributes:
        slices: How many slices it has.
        key: The cache entry its features are stored under; None when they are not stored.
        features: [tokens of its slices, C], or None when its pixels are in the sample instead.
    """

    slices: int
    key: str | None
    features: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SliceSources:
    """Where the features of a batch's slices come from. Stays on the CPU when the batch moves to the device.

    Attributes:
        known: [S] bool, whether the slice's features are in ``known_features``.
        keys: (cache key or None, slices) of every picture whose pixels are in the batch, in their order.
    """

    known: np.ndarray
    keys: list[tuple[str | None, int]]


@dataclass(frozen=True, eq=False)
class NewFeatures:
    """What the vision tower gave for the pictures whose pixels are in the batch; the model's output has it.

    An object, not a list: accelerate would cast a list's tensors to fp32 with the rest of the output.

    Attributes:
        entries: (cache key or None, [tokens, C]) of every such picture.
    """

    entries: list[tuple[str | None, Tensor]]


@dataclass(frozen=True, eq=False)
class Provenance:
    """What the trainer needs to know of a batch and the model does not; it is taken out before the forward.

    Attributes:
        rows: The origin of every sample, in the order of the batch; None for one that contributes nothing.
        supervised_sources: [N] int64, the source of each supervised token, in the order of ``supervised``.
    """

    rows: Sequence[Origin | None]
    supervised_sources: np.ndarray


class Sample(TypedDict):
    """One row of a data file, ready for the collator.

    Keys:
        input_ids: [T] int64.
        labels: [T] int64, the token's id where it is supervised, else ``IGNORE_INDEX``; not shifted. Prompts
            for generation have none.
        loss_weights: [T] float32, how much each supervised token counts in the loss. Only where a message has a
            weight other than 0 and 1.
        pixel_values: [3, 14, 14 * sum(L)] uint8, the patches of all slices side by side. Slices whose features
            are in ``pictures`` are left out.
        tgt_sizes: [S, 2] int32, (rows, columns) of every slice, in patches.
        image_bound: [P, 2] int64, [start, end) in tokens of every run of pad tokens.
        temporal_ids: [S, 2] int64, (run, time index, or -1 for stills). Only with packed video frames (V-4.5).
        mm_token_type_ids: [T] int64, 0 for text, 1 for image and 2 for video tokens. Only for V-4.7.
        audio_values: [80, sum(F)] float32, the log-mel frames of all audio segments side by side. Only with audio.
        audio_segments: [A, 3] int64, of every segment its frames, those of the longest segment of the sample, and
            the audio tokens that have a place. Only with audio.
        audio_bound: [runs, 2] int64, [start, end) in tokens of every run of audio tokens. Only with audio.
        pictures: What the vision cache knows of every image and video. Only with ``--cache_vision_features``.
        origin: Where the sample comes from; None for one that contributes nothing.
    """

    input_ids: Tensor
    labels: NotRequired[Tensor]
    loss_weights: NotRequired[Tensor]
    pixel_values: Tensor
    tgt_sizes: Tensor
    image_bound: Tensor
    temporal_ids: NotRequired[Tensor]
    mm_token_type_ids: NotRequired[Tensor]
    audio_values: NotRequired[Tensor]
    audio_segments: NotRequired[Tensor]
    audio_bound: NotRequired[Tensor]
    pictures: NotRequired[list[PictureFeatures]]
    origin: NotRequired[Origin | None]


class Batch(TypedDict):
    """What a model's forward takes, and ``provenance``, which the trainer takes out first.

    Sizes, bounds and places are numpy arrays: the model reads them as Python numbers, and what stays on the CPU
    costs no wait for the device.

    Keys:
        input_ids: [B, T] int64.
        attention_mask: [B, T] int64, 1 at real tokens.
        labels: [B, T] int64, see ``Sample``; the first token of every sample is never supervised.
        position_ids: [B, T] int64, restarting at 0 with every sample and with the padding. Only with packing.
        mm_token_type_ids: [B, T] int64, see ``Sample``.
        pixel_values: [3, 14, 14 * sum(L)] uint8, of all samples.
        tgt_sizes: [S, 2] int32 array, of all samples.
        image_bound: [P, 3] int64 array, (row, start, end) of all samples.
        temporal_ids: [S, 2] int64 array, see ``Sample``; runs are counted through the batch.
        audio_values: [80, sum(F)] float32, of all samples. Only with audio.
        audio_segments: [A, 3] int64 array, see ``Sample``.
        audio_bound: [runs, 3] int64 array, (row, start, end) of all samples.
        supervised: [N] int64 array, the places in the flattened [B * T] batch whose next token is supervised.
        loss_weights: [N] float32 array, how much each of them counts in the loss. Only where some sample has weights;
            an array, since DeepSpeed would round a tensor to its precision.
        on_cpu: [2 or 3, B, T] int64 array, ``input_ids``, ``attention_mask`` and, with packing,
            ``position_ids``. Only with labels.
        slice_sources: Which slices' features are known. Only with ``--cache_vision_features``.
        known_features: [tokens, C], those features; only where some are known.
        provenance: See ``Provenance``. Only with labels.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: NotRequired[Tensor]
    position_ids: NotRequired[Tensor]
    mm_token_type_ids: NotRequired[Tensor]
    pixel_values: Tensor
    tgt_sizes: np.ndarray
    image_bound: np.ndarray
    temporal_ids: NotRequired[np.ndarray]
    audio_values: NotRequired[Tensor]
    audio_segments: NotRequired[np.ndarray]
    audio_bound: NotRequired[np.ndarray]
    supervised: NotRequired[np.ndarray]
    loss_weights: NotRequired[np.ndarray]
    on_cpu: NotRequired[np.ndarray]
    slice_sources: NotRequired[SliceSources]
    known_features: NotRequired[Tensor]
    provenance: NotRequired[Provenance]

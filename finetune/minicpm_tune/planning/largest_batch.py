"""The batch that a step's memory is planned for: every row full, with as many slices and as much audio as allowed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minicpm_tune.batch import IGNORE_INDEX, Sample
from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.data.collating import data_collator
from minicpm_tune.errors import UserError
from minicpm_tune.models.batch_layout import PATCH
from minicpm_tune.models.minicpmv.audio import MEL_BINS, Segment

_TAG_TOKENS = 2  # tokens around a placeholder
_SEGMENT_SECONDS, _MEL_PER_SECOND = 30, 100  # the encoder's longest segment, and its frames


class PlanError(UserError):
    """A training that can't be planned."""


def largest_image(
    model: Any, generation: Generation, *, slices: int, room: int
) -> list[tuple[tuple[int, int], int]]:
    """The slices of an image that is cut as often as the limits allow.

    Args:
        model: A model of any generation.
        generation: Its generation.
        slices: Most slices, the overview included.
        room: Most tokens.

    Returns:
        For every slice, its (rows, columns) in patches and its tokens; empty when not even one fits.
    """
    tags = _TAG_TOKENS if generation.slice_tag else 0
    for count in range(slices, 0, -1):
        image = [(grid, model.slice_tokens(grid)) for grid in model.slice_grids(count)]
        if sum(tokens + tags for _, tokens in image) <= room:
            return image
    return []


def largest_sample(
    model: PreTrainedModel, generation: Generation, *, length: int, slices: int, audio_seconds: int = 0
) -> Sample:
    """A full row, with one image of as many full slices as fit, behind the audio.

    Args:
        model: On the meta device; gives sizes and token ids.
        generation: Its generation.
        length: Tokens of the row.
        slices: Slices of its image, the overview included.
        audio_seconds: Seconds of audio, for models that hear.

    Returns:
        The sample. Every token that is not a placeholder is supervised.

    Raises:
        PlanError: When the audio does not fit into the row.
    """
    sample: Any = {"input_ids": torch.zeros(length, dtype=torch.int64), **_audio(model, audio_seconds)}
    start = 1
    heard = sample.get("audio_bound", torch.zeros(0, 2, dtype=torch.int64)).tolist()
    if heard:
        start = heard[-1][1] + _TAG_TOKENS
        if start > length:
            raise PlanError(
                f"--audio_seconds {audio_seconds}: the audio alone takes {start} tokens, more than the {length} of "
                "--model_max_length. Lower the one or raise the other."
            )
    sizes, bounds = [], []
    for size, tokens in largest_image(model, generation, slices=slices, room=length - start):
        sizes.append(size)
        bounds.append((start, start + tokens))
        start += tokens + _TAG_TOKENS
    sample["tgt_sizes"] = torch.tensor(sizes, dtype=torch.int32).reshape(-1, 2)
    sample["image_bound"] = torch.tensor(bounds, dtype=torch.int64).reshape(-1, 2)
    patches = sum(height * width for height, width in sizes)
    sample["pixel_values"] = torch.zeros((3, PATCH, PATCH * patches), dtype=torch.uint8)
    sample["labels"] = sample["input_ids"].clone()
    types = torch.zeros_like(sample["input_ids"])
    for first, end in [*bounds, *heard]:
        sample["input_ids"][first:end] = getattr(model.config, "image_token_id", 0)
        sample["labels"][first:end] = IGNORE_INDEX
        types[first:end] = 1
    if generation.token_types:
        sample["mm_token_type_ids"] = types
    return sample


def largest_batch(
    model: PreTrainedModel,
    generation: Generation,
    *,
    rows: int,
    length: int,
    slices: int,
    audio_seconds: int = 0,
) -> dict[str, Any]:
    """A batch of such rows; the other arguments as for ``largest_sample``.

    Returns:
        Arguments of the model's forward, on the CPU.
    """
    sample = largest_sample(model, generation, length=length, slices=slices, audio_seconds=audio_seconds)
    batch: dict[str, Any] = {**data_collator([sample] * rows)}
    del batch["provenance"]
    return batch


def _audio(model: Any, seconds: int) -> dict[str, Tensor]:
    """The audio of a sample, in segments of 30 s, at its beginning."""
    if not seconds:
        return {}
    lengths = [
        _MEL_PER_SECOND * min(_SEGMENT_SECONDS, seconds - start)
        for start in range(0, seconds, _SEGMENT_SECONDS)
    ]
    tokens = [Segment(frames, max(lengths)).tokens(model.config.audio_pool) for frames in lengths]
    ends = torch.tensor(tokens).cumsum(0)
    return {
        "audio_values": torch.zeros((MEL_BINS, sum(lengths)), dtype=torch.float32),
        "audio_segments": torch.tensor(
            [(frames, max(lengths), kept) for frames, kept in zip(lengths, tokens, strict=True)]
        ),
        "audio_bound": torch.stack([ends - torch.tensor(tokens), ends], dim=1) + 1,
    }

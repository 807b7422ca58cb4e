"""Plans -> samples -> a batch: patches of what is seen, log-mel frames of what is heard, and the places of both.

Only here are images, videos and audio decoded. Letters as in ``minicpm_tune/batch.py``; F frames of all audio segments,
A those segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from minicpm_tune.batch import IGNORE_INDEX, Batch, PictureFeatures, Provenance, Sample, SliceSources
from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.data.media.audio import AudioRules, Clip, log_mel, merged
from minicpm_tune.data.media.images import Picture
from minicpm_tune.data.media_rules import MediaRules
from minicpm_tune.data.placeholders import Layouts, PlaceholderStyle
from minicpm_tune.data.prompts import Piece
from minicpm_tune.data.slicing.layouts import cut_into_patches, patch_columns
from minicpm_tune.data.token_labels import Encoded
from minicpm_tune.data.vision_cache import VisionCache


@dataclass(frozen=True)
class Plan:
    """A sample before any pixel is decoded.

    Attributes:
        pieces: The prompt.
        encoded: Its tokens and labels.
        pictures: Its images, videos and audios.
        layouts: How every frame of each is cut.
    """

    pieces: Sequence[Piece]
    encoded: Encoded
    pictures: tuple[Picture | Clip, ...]
    layouts: Layouts

    @property
    def clips(self) -> list[Clip]:
        """Its audios, and the sound of its videos in pieces."""
        return [clip for picture in self.pictures for clip in _heard_in(picture)]


def _heard_in(picture: Picture | Clip) -> tuple[Clip, ...]:
    """What is heard of a medium: a clip itself, of a video its sound, of an image nothing."""
    return (picture,) if isinstance(picture, Clip) else picture.sound


def sample_tensors(
    plan: Plan,
    *,
    generation: Generation,
    tokenizer: PreTrainedTokenizerFast,
    media: MediaRules,
    cache: VisionCache | None = None,
) -> Sample:
    """Decode what a plan shows and sounds; what was cut off is not decoded.

    Args:
        plan: The plan.
        generation: The checkpoint's generation.
        tokenizer: Its tokenizer.
        media: How its media are cut and written.
        cache: Where the vision tower's features are stored. Only those pictures are decoded whose features are not
            there yet; see ``batch.PictureFeatures``.

    Returns:
        The sample without labels.
    """
    encoded = plan.encoded
    kept = len(encoded.media_spans)  # the rest was cut off
    pictures = [picture for picture in plan.pictures[:kept] if isinstance(picture, Picture)]
    layouts = [frames for frames in plan.layouts[:kept] if frames]  # those of a clip are none
    known = [] if cache is None else cache.pictures(pictures, layouts)
    unknown = [index for index in range(len(pictures)) if not known or known[index].features is None]
    input_ids = torch.tensor(encoded.input_ids, dtype=torch.int64)
    sizes = [size for frames in layouts for layout in frames for size in layout.tgt_sizes]
    sample: Sample = {
        "input_ids": input_ids,
        "pixel_values": _patches(
            [pictures[index] for index in unknown],
            [layouts[index] for index in unknown],
            media.slicing.patch_size,
        ),
        "tgt_sizes": torch.tensor(sizes, dtype=torch.int32).reshape(-1, 2),
        "image_bound": torch.tensor(encoded.image_bound, dtype=torch.int64).reshape(-1, 2),
    }
    if encoded.audio_bound:
        sample["audio_bound"] = torch.tensor(encoded.audio_bound)
        values = _audio_tensors(plan, media.audio, generation)
        sample["audio_values"], sample["audio_segments"] = values
    if generation.token_types:
        sample["mm_token_type_ids"] = _token_types(input_ids, tokenizer, media.style)
    if cache is not None:
        sample["pictures"] = known
    if any(picture.packs for picture in pictures):
        sample["temporal_ids"] = torch.tensor(list(_run_and_time(pictures, layouts)), dtype=torch.int64)
    return sample


def _patches(pictures: Sequence[Picture], layouts: Layouts, patch_size: int) -> Tensor:
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


def _token_types(input_ids: Tensor, tokenizer: PreTrainedTokenizerFast, style: PlaceholderStyle) -> Tensor:
    """0 for text, 1 for image tokens, 2 for video tokens ``[T]``, as transformers' processor of 4.7 gives."""
    types = torch.zeros_like(input_ids)
    types[input_ids == tokenizer.convert_tokens_to_ids(style.pad)] = 1
    types[input_ids == tokenizer.convert_tokens_to_ids(style.video_pad)] = 2
    return types


def _run_and_time(pictures: Sequence[Picture], layouts: Layouts) -> Iterator[tuple[int, int]]:
    """For every slice, the run of pad tokens it belongs to and its time index, -1 for stills.

    Packed frames are never cut (their rules say one slice), so a frame is a slice.
    """
    run = 0
    for picture, frames in zip(pictures, layouts, strict=True):
        slices = sum(len(layout.tgt_sizes) for layout in frames)
        for times in [(-1,)] * slices if picture.packs is None else picture.packs:
            for time in times:
                yield run, time
            run += 1


# --- what is heard ---


def _audio_tensors(plan: Plan, rules: AudioRules | None, generation: Generation) -> tuple[Tensor, Tensor]:
    """``audio_values`` [80, F] and ``audio_segments`` [A, 3] of a sample, see ``batch.Sample``.

    The audios of a message are heard as one waveform, as in the released ``chat``. Its tokens can then be more than
    there are places, and the last ones are dropped; or fewer, which the released code can't do, and then each audio
    is heard by itself.
    """
    assert rules is not None
    assert generation.hearing is not None
    pictures = plan.pictures[: len(plan.encoded.media_spans)]  # the rest was cut off
    message = accumulate(
        piece.text == generation.turn_end for piece in plan.pieces
    )  # of every piece its number
    numbers = [number for number, piece in zip(message, plan.pieces, strict=True) if piece.media is not None]
    heard = [
        (clip, number)
        for picture, number in zip(pictures, numbers, strict=False)
        for clip in _heard_in(picture)
    ]
    clips, messages = [clip for clip, _ in heard], [number for _, number in heard]
    places = sum(end - start for start, end in plan.encoded.audio_bound)
    waveforms = merged(clips, messages if generation.hearing.merges else range(len(clips)))
    if sum(rules.tokens(len(waveform)) for waveform in waveforms) < places:
        waveforms = merged(clips, range(len(clips)))
    mels = log_mel(waveforms)
    longest, left, segments = max(mel.shape[1] for mel in mels), places, []
    for mel in mels:
        kept = min(rules.tokens_of_frames(mel.shape[1]), left)
        left -= kept
        segments.append((mel.shape[1], longest, kept))
    return torch.from_numpy(np.concatenate(mels, axis=1)), torch.tensor(segments)


# --- a batch: packed rows, single rows, and prompts for generation ---


@dataclass(frozen=True)
class _Placed:
    """A sample with its place in the batch: ``row``, and [start, end) in tokens of that row."""

    sample: Sample
    row: int
    start: int

    @property
    def span(self) -> tuple[int, slice]:
        return self.row, slice(self.start, self.start + len(self.sample["input_ids"]))


def data_collator(
    rows: Sequence[Sample | list[Sample]],
    *,
    pad_token_id: int = 0,
    packing: bool = False,
    padding_side: Literal["right", "left"] = "right",
) -> Batch:
    """Make a batch.

    Args:
        rows: What ``SupervisedDataset`` gives; a list of samples shares one row. Samples may be prompts.
        pad_token_id: What ``input_ids`` are padded with; any valid id, since padding is never attended.
        packing: Whether rows may hold several samples; the model then tells them apart by ``position_ids``.
        padding_side: ``right`` for training; ``left`` for generation, so that the prompts end side by side.

    Returns:
        The batch, with the keys that ``Batch`` lists.
    """
    placed, shape = _place(rows, padding_side)
    samples = [each.sample for each in placed]
    batch: Batch = {
        "input_ids": _spread(placed, shape, pad_token_id, lambda sample: sample["input_ids"]),
        "attention_mask": _spread(placed, shape, 0, lambda sample: 1),
        "pixel_values": torch.cat([sample["pixel_values"] for sample in samples], dim=2),
        "tgt_sizes": torch.cat([sample["tgt_sizes"] for sample in samples]).numpy(),
        "image_bound": _bounds(placed, "image_bound"),
    }
    if "mm_token_type_ids" in samples[0]:
        batch["mm_token_type_ids"] = _spread(placed, shape, 0, lambda sample: sample["mm_token_type_ids"])
    if any("temporal_ids" in sample for sample in samples):
        batch["temporal_ids"] = _temporal_ids(samples)
    heard = [each for each in placed if "audio_values" in each.sample]
    if heard:
        batch["audio_values"] = torch.cat([each.sample["audio_values"] for each in heard], dim=1)
        batch["audio_segments"] = torch.cat([each.sample["audio_segments"] for each in heard]).numpy()
        batch["audio_bound"] = _bounds(heard, "audio_bound")
    if packing:
        batch["position_ids"] = _position_ids(placed, shape)
    if "labels" in samples[0]:
        copied = [batch["input_ids"], batch["attention_mask"], *([batch["position_ids"]] if packing else [])]
        batch["on_cpu"] = torch.stack(copied).numpy()
        batch["labels"] = _labels(placed, shape)
        batch["supervised"] = supervised_places(batch["labels"])
        batch["provenance"] = _provenance(placed, shape, batch["supervised"])
        if any("loss_weights" in sample for sample in samples):
            batch["loss_weights"] = _loss_weights(placed, shape, batch["supervised"])
    if any("pictures" in sample for sample in samples):
        pictures = [picture for sample in samples for picture in sample.get("pictures", ())]
        batch["slice_sources"] = _slice_sources(pictures)
        known = [picture.features for picture in pictures if picture.features is not None]
        if known:
            batch["known_features"] = torch.cat(known)
    return batch


def _place(rows: Sequence[Sample | list[Sample]], padding_side: str) -> tuple[list[_Placed], tuple[int, int]]:
    """Give every sample its place, and the batch its shape [B, T]."""
    lists = [row if isinstance(row, list) else [row] for row in rows]
    lengths = [sum(len(sample["input_ids"]) for sample in row) for row in lists]
    width = max(lengths)
    placed = []
    for number, (row, length) in enumerate(zip(lists, lengths, strict=True)):
        start = width - length if padding_side == "left" else 0
        for sample in row:
            placed.append(_Placed(sample, number, start))
            start += len(sample["input_ids"])
    return placed, (len(rows), width)


def _spread(
    placed: Sequence[_Placed],
    shape: tuple[int, int],
    fill: int,
    value: Callable[[Sample], Any],
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """[B, T] with a value of every sample at its tokens, and ``fill`` elsewhere."""
    values = torch.full(shape, fill, dtype=dtype)
    for each in placed:
        values[each.span] = value(each.sample)
    return values


def _position_ids(placed: Sequence[_Placed], shape: tuple[int, int]) -> Tensor:
    """[B, T] positions that restart with every sample; the padding behind them counts as one more."""
    starts = torch.zeros(shape, dtype=torch.int64)
    for each in placed:
        row, span = each.span
        starts[row, span] = span.start
        starts[row, span.stop :] = span.stop
    return torch.arange(shape[1]) - starts


def _labels(placed: Sequence[_Placed], shape: tuple[int, int]) -> Tensor:
    labels = _spread(placed, shape, IGNORE_INDEX, lambda sample: sample["labels"])
    for each in placed:
        # Nothing predicts the first token of a sample; in a packed row the token before belongs to another.
        labels[each.row, each.start] = IGNORE_INDEX
    return labels


def _bounds(placed: Sequence[_Placed], key: Literal["image_bound", "audio_bound"]) -> np.ndarray:
    """[runs, 3] (row, start, end) of one key of every sample."""
    bounds = [
        torch.nn.functional.pad(each.sample[key] + each.start, (1, 0), value=each.row) for each in placed
    ]
    return torch.cat(bounds).numpy()


def supervised_places(labels: Tensor) -> np.ndarray:
    """Places in the flattened batch whose next token has a label.

    Example:
        >>> supervised_places(torch.tensor([[-100, 5, -100], [-100, -100, 7]])).tolist()
        [0, 4]
    """
    rows, columns = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    return (rows * labels.shape[1] + columns).numpy()


def _provenance(placed: Sequence[_Placed], shape: tuple[int, int], supervised: np.ndarray) -> Provenance:
    sources = _spread(placed, shape, -1, lambda sample: (sample.get("origin") or (-1,))[0])
    return Provenance([each.sample.get("origin") for each in placed], sources.numpy().ravel()[supervised])


def _loss_weights(placed: Sequence[_Placed], shape: tuple[int, int], supervised: np.ndarray) -> np.ndarray:
    """[N] how much each supervised token counts; 1 in samples that do not say."""
    weights = _spread(placed, shape, 1, lambda sample: sample.get("loss_weights", 1), torch.float32)
    return weights.numpy().ravel()[supervised + 1]


def _temporal_ids(samples: Sequence[Sample]) -> np.ndarray:
    """[S, 2] (run, time index); runs are counted through the batch, and a still's slices have their own."""
    counted, first = [], 0
    for sample in samples:
        runs = len(sample["image_bound"])
        stills = torch.stack([torch.arange(runs), torch.full((runs,), -1)], dim=1)
        counted.append(sample.get("temporal_ids", stills) + torch.tensor([first, 0]))
        first += runs
    return torch.cat(counted).numpy()


def _slice_sources(pictures: Sequence[PictureFeatures]) -> SliceSources:
    known = np.array([picture.features is not None for picture in pictures], dtype=bool)
    unknown = [(picture.key, picture.slices) for picture in pictures if picture.features is None]
    return SliceSources(np.repeat(known, [picture.slices for picture in pictures]), unknown)

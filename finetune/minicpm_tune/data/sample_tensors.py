"""A planned sample -> its tensors: patches of what is seen, log-mel frames of what is heard, and where both go.

Only here are images, videos and audio decoded. Shapes: T is a sample's length in tokens, S its slices, P the runs of
pad tokens that stand for them (a pack of video frames shares one), L a slice's patches, F frames of all audio
segments, A those segments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from minicpm_tune.batch import Sample
from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.data.media.audio import AudioRules, Clip, log_mel, merged
from minicpm_tune.data.media.images import Picture
from minicpm_tune.data.placeholders import Layouts, PlaceholderStyle
from minicpm_tune.data.prompts import Piece
from minicpm_tune.data.slicing.layouts import cut_into_patches, patch_columns
from minicpm_tune.data.slicing.media_rules import MediaRules
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


def _patches(pictures: Sequence[Picture], layouts: Layouts, patch_size: int) -> torch.Tensor:
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


def _token_types(
    input_ids: torch.Tensor, tokenizer: PreTrainedTokenizerFast, style: PlaceholderStyle
) -> torch.Tensor:
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


def _audio_tensors(
    plan: Plan, rules: AudioRules | None, generation: Generation
) -> tuple[torch.Tensor, torch.Tensor]:
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

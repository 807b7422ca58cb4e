"""The audio of a sample: what stands for it in the prompt, and the log-mel frames that the model hears.

Audio is a row's own clips, and the sound of its films. Shapes: F frames of all segments, A segments.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.data.media.audio import AudioRules, Clip, log_mel, merged
from minicpm_tune.data.media.images import Picture
from minicpm_tune.data.placeholders import Placeholder, PlaceholderStyle, film_placeholder
from minicpm_tune.data.prompts import Piece
from minicpm_tune.data.slicing.layouts import ImageLayout
from minicpm_tune.errors import RowError


def heard_in(picture: Picture | Clip) -> tuple[Clip, ...]:
    """What is heard of a medium: a clip itself, of a film its sound, of a picture nothing."""
    return (picture,) if isinstance(picture, Clip) else picture.sound


def audio_runs(clip: Clip, rules: AudioRules | None) -> list[int]:
    """Lengths of the runs of pad tokens that stand for a clip.

    Raises:
        RowError: When it is too short for a token.
    """
    assert rules is not None, clip
    runs = rules.runs(clip.samples)
    if not runs:
        raise RowError(
            "audio",
            f"audio {clip.name} has {clip.samples} samples of 16 kHz, expected at least {rules.fewest_samples}: "
            "fewer make no audio token. Replace it, or remove the row.",
        )
    return runs


def sounding_film(
    film: Picture,
    layouts: Sequence[ImageLayout],
    rules: AudioRules | None,
    generation: Generation,
    style: PlaceholderStyle,
) -> Placeholder:
    """What stands for a film with its sound.

    Raises:
        RowError: When all of its sound is too short for a token.
    """
    hearing = generation.hearing
    assert rules is not None, film
    assert hearing is not None, film
    runs = [rules.runs(clip.samples) for clip in film.sound]
    if not any(runs):
        raise RowError(
            "audio",
            f"the sound of video {film.sound[0].name} has {sum(clip.samples for clip in film.sound)} samples of 16 "
            'kHz, expected enough for an audio token. Set "use_audio": false in the row, or replace it.',
        )
    return film_placeholder(layouts, runs, style, unit=hearing.unit, tags_alone=not hearing.per_second)


def message_numbers(pieces: Sequence[Piece], turn_end: str) -> list[int]:
    """The number of the message that each medium stands in."""
    messages, number = [], 0
    for piece in pieces:
        if piece.media is not None:
            messages.append(number)
        number += piece.text == turn_end
    return messages


def audio_tensors(
    heard: Sequence[tuple[Clip, int]], places: int, rules: AudioRules | None, generation: Generation
) -> tuple[torch.Tensor, torch.Tensor]:
    """``audio_values`` [80, F] and ``audio_segments`` [A, 3] of a sample, see ``batch.Sample``.

    The audios of a message are heard as one waveform, as in the released ``chat``. Its tokens can then be more than
    there are places, and the last ones are dropped; or fewer, which the released code can't do, and then each audio
    is heard by itself.

    Args:
        heard: Clips, each with the number of its message.
        places: Pad tokens that stand for them.
        rules: How audio becomes frames and tokens.
        generation: The checkpoint's.
    """
    assert rules is not None
    assert generation.hearing is not None
    clips, messages = [clip for clip, _ in heard], [message for _, message in heard]
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

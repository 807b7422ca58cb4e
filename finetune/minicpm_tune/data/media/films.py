"""A video together with its sound, as MiniCPM-o takes both: a frame, the sound of its second, the next frame ...

The released guides cut a film up and hand the pieces to ``chat`` in its omni form:

- o-2.6 (``get_video_chunk_content``): a unit for every second that has begun, by the length of the file. Its frame is
  the one at the END of the second; where the film has none there, that of the second before. The sound is filled up
  with silence to the length of the file.
- o-4.5 (``get_video_frame_audio_segments`` of minicpmo-utils 1.0.7): the frame at the begin of every second, by the
  length of the pictures. A film longer than 64 s gives 64 frames, evenly, at tenths of a second, and each has the sound
  up to the next one. The last piece of sound is at least 0.1 s long.

Held by ``tests/data/test_films.py`` against what moviepy 2.2 and these rules give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minicpm_tune.data.media.audio import RATE, Clip, decode_sound
from minicpm_tune.data.media.images import ImageOptions, Picture
from minicpm_tune.data.media.sources import check_file
from minicpm_tune.data.media.videos import decode_frames, film_error, is_list_of_frames, probe_video
from minicpm_tune.errors import RowError

TENTHS = 10  # grid points per second of a film that is thinned out
_SHORTEST_END = RATE // 10  # samples of the last piece of sound of o-4.5


@dataclass(frozen=True)
class FilmRules:
    """How a generation cuts a video with its sound.

    Attributes:
        units: Whether it is cut into units of a second (o-2.6), or into frames and the sound after each (o-4.5).
        max_num_frames: Most frames; None: no limit.
        fps: Frames per second of video; both generations know 1 alone.
    """

    units: bool
    max_num_frames: int | None
    fps: float = 1.0

    def for_one(self, fps: float | None, max_frames: int | None) -> FilmRules:
        """The rules for a film whose row sets its own frame rate or most frames."""
        return replace(
            self,
            fps=self.fps if fps is None else fps,
            max_num_frames=self.max_num_frames if max_frames is None else max_frames,
        )


@dataclass(frozen=True)
class FilmPlan:
    """Which frames of a film are shown, and what is heard after each.

    Attributes:
        frames: Their numbers, in order; one may come twice.
        starts: Where the sound of each begins, in samples of 16 kHz.
        end: Where that of the last one ends.
    """

    frames: list[int]
    starts: list[int]
    end: int


def plan_film(count: int, fps: float, duration: float, rules: FilmRules) -> FilmPlan:
    """Cut a film.

    Args:
        count: Frames in it.
        fps: Its frames per second.
        duration: Length of the file, in seconds; the sound may be longer than the pictures.
        rules: The generation's rules.

    Example:
        >>> plan_film(47, 10.0, 4.7, FilmRules(units=True, max_num_frames=None))
        FilmPlan(frames=[10, 20, 30, 40, 40], starts=[0, 16000, 32000, 48000, 64000], end=75200)
        >>> plan_film(25, 10.0, 2.6, FilmRules(units=False, max_num_frames=64))
        FilmPlan(frames=[0, 10, 20], starts=[0, 16000, 32000], end=40000)
    """
    if rules.units:
        duration = math.floor(round(duration * 100, 6)) / 100  # as ffmpeg prints it
        times: Sequence[float] = range(math.ceil(duration))
        frames = [int(fps * (second + 1) + 1e-5) for second in times]
        for place, frame in enumerate(frames):
            if frame >= count:
                frames[place] = frames[place - 1] if place else 0
    else:
        duration = count / fps
        times = range(math.ceil(duration))
        if rules.max_num_frames is not None and duration > rules.max_num_frames:
            times = [round(tenth / TENTHS, 1) for tenth in range(int(duration / (1 / TENTHS)))]
        frames = [min(int(time * fps), count - 1) for time in times]
    if rules.max_num_frames is not None and len(frames) > rules.max_num_frames:
        chosen = np.linspace(0, len(frames) - 1, rules.max_num_frames, dtype=int)
        frames, times = [frames[index] for index in chosen], [times[index] for index in chosen]
    return FilmPlan(frames, [int(time * RATE) for time in times], int(duration * RATE))


def open_film(value: Any, options: ImageOptions, rules: FilmRules) -> Picture:
    """Open a video with its sound for a sample; its sound is decoded at once, its frames when asked for.

    Args:
        value: A path to a film.
        options: How files are found.
        rules: How it is cut.

    Returns:
        A picture of kind ``video`` with ``sound``.

    Raises:
        RowError: When it can't be read, or has no sound.
    """
    if is_list_of_frames(value, options):
        raise RowError(
            "video",
            "the video is a list or a folder of frames, which has no sound, expected a film. Give the film, or set "
            '"use_audio": false in the row.',
        )
    if rules.fps != 1:
        raise RowError(
            "video",
            f"the video is sampled at {rules.fps:g} frames per second, expected 1, since with its sound it has one "
            "frame for each second. Leave --video_fps (and fps in the row) out, or --video_sound (and use_audio).",
        )
    path = check_file(value, options.folder, "video")
    found = probe_video(path)
    if not found.sounds:
        raise film_error(
            path, 'has no sound, expected some. Set "use_audio": false in the row to use its pictures alone.'
        )
    plan = plan_film(found.count, found.fps, found.duration, rules)
    pieces = _cut(decode_sound(path, repr(str(path))), plan, rules)
    return Picture(
        "video",
        (found.size,) * len(plan.frames),
        lambda: decode_frames(path, plan.frames),
        seconds=found.duration,
        sound=tuple(Clip.of(piece, repr(str(path))) for piece in pieces),
    )


def _cut(waveform: np.ndarray, plan: FilmPlan, rules: FilmRules) -> list[np.ndarray]:
    """The sound after each frame; a piece has no samples where the sound has ended."""
    if rules.units:
        waveform = _filled_up(waveform, plan.end)
    ends = [*plan.starts[1:], plan.end]
    pieces = [waveform[start:end] for start, end in zip(plan.starts, ends, strict=True)]
    if not rules.units:
        pieces[-1] = _filled_up(pieces[-1], _SHORTEST_END)
    return pieces


def _filled_up(waveform: np.ndarray, length: int) -> np.ndarray:
    return np.pad(waveform, (0, max(length - len(waveform), 0)))

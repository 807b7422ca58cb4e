"""``--stack_frames``: MiniCPM-V 4.6 and 4.7 also see what happens within each second of a film.

With N frames per second, the first of each second is a picture of its own, and the other N - 1 follow it as one
composite picture.

Source: ``sample_frames``, ``concat_frames_as_image`` and ``_preprocess`` of transformers' MiniCPMV4_6VideoProcessor
(5.23), which pairs the i-th picture with the i-th second, also in films that are too long for one picture a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np
from PIL import Image

LINE = 6  # pixels, black, between the frames of a composite

Size = tuple[int, int]


def visual_units(
    main: Sequence[int], count: int, fps: float, *, per_second: int, max_num_frames: int
) -> list[tuple[int, ...]]:
    """The frames of every picture: one, or those of a composite.

    Args:
        main: The frames that are pictures of their own.
        count: Frames in the film.
        fps: Its frames per second.
        per_second: ``--stack_frames``.
        max_num_frames: Most pictures of one frame.

    Example:
        >>> visual_units([0, 24], 48, 24.0, per_second=3, max_num_frames=128)
        [(0,), (8, 16), (24,), (32, 40)]
    """
    duration = count / fps
    times = [
        second + part / per_second
        for second in range(math.ceil(duration))
        for part in range(1, per_second)
        if second + part / per_second < duration
    ]
    most = max_num_frames * (per_second - 1)
    if len(times) > most:
        times = [times[index] for index in np.linspace(0, len(times) - 1, most, dtype=int)]
    within = {
        second: tuple(min(int(time * fps), count - 1) for time in group)
        for second, group in groupby(times, key=int)
    }
    units: list[tuple[int, ...]] = []
    for number, frame in enumerate(main):
        units += [(frame,), *([within[number]] if number in within else [])]
    return units


def composite_size(frames: int, size: Size) -> Size:
    """(width, height) of a composite of so many frames, in pixels."""
    rows, columns = _grid(frames, size)
    width, height = size
    return columns * width + (columns - 1) * LINE, rows * height + (rows - 1) * LINE


def _grid(frames: int, size: Size) -> tuple[int, int]:
    """Rows and columns: 2 x 2 for four frames, one row for five and more, else what is closer to a square."""
    if frames == 4:
        return 2, 2
    if frames not in (2, 3):
        return 1, frames
    width, height = size
    beside = (frames * width + (frames - 1) * LINE) / height
    below = width / (frames * height + (frames - 1) * LINE)
    if abs(beside - 1) == abs(below - 1):
        return (1, frames) if frames == 3 or width >= height else (frames, 1)
    return (1, frames) if abs(beside - 1) < abs(below - 1) else (frames, 1)


def composite(frames: Sequence[Image.Image]) -> Image.Image:
    """Frames of one size on one picture, row by row."""
    size = frames[0].size
    _, columns = _grid(len(frames), size)
    canvas = Image.new("RGB", composite_size(len(frames), size))
    for number, frame in enumerate(frames):
        row, column = divmod(number, columns)
        canvas.paste(frame, (column * (size[0] + LINE), row * (size[1] + LINE)))
    return canvas


def pictures_of(
    units: Sequence[tuple[int, ...]], chosen: Sequence[int], frames: Iterable[Image.Image]
) -> Iterator[Image.Image]:
    """The pictures of a film, holding a frame no longer than it is needed.

    Args:
        units: From ``visual_units``.
        chosen: All frames in them, each once, in ascending order.
        frames: The decoded frames, in that order.
    """
    last_use = {frame: number for number, unit in enumerate(units) for frame in unit}
    decoded = zip(chosen, frames, strict=True)
    held: dict[int, Image.Image] = {}
    for number, unit in enumerate(units):
        while not all(frame in held for frame in unit):
            frame, image = next(decoded)
            held[frame] = image
        yield held[unit[0]] if len(unit) == 1 else composite([held[frame] for frame in unit])
        for frame in set(unit):
            if last_use[frame] == number:
                del held[frame]

"""Which frames of a video are used, decoding them, and stacking what happens within each second (4.6, 4.7).

Each generation samples frames as its released inference does:

- 2.6, o-2.6, 4: one frame per second; more than 64 are thinned out evenly.
- 4.5: three frames per second; above 180 frames, up to three neighbors are packed into one placeholder.
- 4.6, 4.7: one frame per second; a video longer than 128 s gives 128 frames, evenly. ``--stack_frames`` adds those
  within each second.

A folder or list of frame images is taken as a video that was already sampled at ``fps``.

``--stack_frames N``: of N frames per second, the first of each second is a picture of its own, and the other N - 1
follow it as one composite picture.

Source: ``sample_frames``, ``concat_frames_as_image`` and ``_preprocess`` of transformers' MiniCPMV4_6VideoProcessor
(5.23), which pairs the i-th picture with the i-th second, also in films that are too long for one picture a second.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minicpm_tune.data.media.images import ImageFile, ImageOptions, Picture
from minicpm_tune.data.media.sources import check_file, find_file
from minicpm_tune.errors import RowError

TIME_STEP_S = 0.1  # a time index of 4.5 is a tenth of a second
LINE = 6  # pixels, black, between the frames of a composite
_FRAME_NAMES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

Size = tuple[int, int]  # width and height, in pixels


@dataclass(frozen=True)
class VideoRules:
    """How a generation samples videos.

    Attributes:
        method: ``step``, ``packs`` or ``seconds``, see the module's docstring.
        fps: Frames per second of video.
        max_num_frames: Most frames; for ``packs``, most packs.
        max_slice_nums: Most slices a frame is cut into.
        max_frames_per_pack: Most frames in a pack, for ``packs``.
        stack_frames: Frames per second of a film that are shown, for ``seconds``; see ``visual_units``.
    """

    method: str
    fps: float
    max_num_frames: int
    max_slice_nums: int
    max_frames_per_pack: int = 1
    stack_frames: int = 1

    def for_one(self, fps: float | None, max_frames: int | None) -> VideoRules:
        """The rules for a video whose row sets its own frame rate or most frames."""
        return replace(
            self,
            fps=self.fps if fps is None else fps,
            max_num_frames=self.max_num_frames if max_frames is None else max_frames,
        )


def choose_frames(count: int, fps: float, rules: VideoRules) -> tuple[list[int], list[list[int]] | None]:
    """Choose the frames of a video.

    Args:
        count: Frames in the video.
        fps: Its frames per second.
        rules: The generation's rules.

    Returns:
        The frames' numbers, and for ``packs`` their time indices, pack by pack.

    Example:
        >>> choose_frames(100, 25.0, VideoRules("step", 1.0, 64, 2))
        ([0, 25, 50, 75], None)
    """
    if rules.method == "packs":
        return _packed_frames(count, fps, rules)
    if rules.method == "seconds":
        return _every_second(count, fps, rules), None
    frames = list(range(0, count, max(round(fps / rules.fps), 1)))
    return _thinned(frames, rules.max_num_frames) if len(frames) > rules.max_num_frames else frames, None


def _thinned(frames: Sequence[int], count: int) -> list[int]:
    """The middle frame of each of ``count`` equal stretches."""
    gap = len(frames) / count
    return [frames[int(index * gap + gap / 2)] for index in range(count)]


def _every_second(count: int, fps: float, rules: VideoRules) -> list[int]:
    duration = count / fps
    wanted = math.ceil(duration * rules.fps)
    if wanted <= rules.max_num_frames:
        return [min(int(index * fps / rules.fps), count - 1) for index in range(wanted)]
    tenths = [
        min(int(round(index * TIME_STEP_S, 1) * fps), count - 1)
        for index in range(int(duration / TIME_STEP_S))
    ]
    if len(tenths) <= rules.max_num_frames:
        return tenths
    return [tenths[index] for index in np.linspace(0, len(tenths) - 1, rules.max_num_frames, dtype=int)]


def _packed_frames(count: int, fps: float, rules: VideoRules) -> tuple[list[int], list[list[int]]]:
    duration = count / fps
    if rules.fps * int(duration) <= rules.max_num_frames:
        pack = 1
        wanted = round(min(rules.fps, round(fps)) * min(rules.max_num_frames, duration))
    else:
        pack = math.ceil(duration * rules.fps / rules.max_num_frames)
        wanted = round(duration * rules.fps)
        if pack > rules.max_frames_per_pack:
            pack, wanted = rules.max_frames_per_pack, rules.max_num_frames * rules.max_frames_per_pack
    frames = _thinned(range(count), min(max(wanted, 1), count))
    # The released code looks up the nearest multiple of the step and divides; kept, for its rounding.
    scale = np.arange(0, duration, TIME_STEP_S)
    nearest = [int(np.abs(scale - frame / fps).argmin()) for frame in frames]
    times = (scale[nearest] / TIME_STEP_S).astype(np.int32).tolist()
    return frames, [times[start : start + pack] for start in range(0, len(times), pack)]


def open_video(value: Any, options: ImageOptions, rules: VideoRules) -> Picture:
    """Open a video for a sample; its frames are decoded when asked for.

    Args:
        value: A path to a film, a folder of frame images, or a list of frame images.
        options: How files are found and opened.
        rules: How frames are chosen.

    Returns:
        The picture.

    Raises:
        RowError: When it can't be read.
    """
    if is_list_of_frames(value, options):
        sources = _frame_sources(value, options)
        chosen, packs = choose_frames(len(sources), rules.fps, rules)
        files = [ImageFile(sources[index], options) for index in chosen]
        return Picture(
            "video",
            tuple(file.size for file in files),
            lambda: (file.decode() for file in files),
            packs,
            seconds=len(sources) / rules.fps,
        )
    path = check_file(value, options.folder, "video")
    found = probe_video(path)
    chosen, packs = choose_frames(found.count, found.fps, rules)
    seconds = found.count / found.fps
    if rules.stack_frames > 1:
        units = _stacked_units(chosen, found, rules)
        shown = sorted({frame for unit in units for frame in unit})
        sizes = tuple(composite_size(len(unit), found.size) for unit in units)
        return Picture(
            "video", sizes, lambda: pictures_of(units, shown, decode_frames(path, shown)), seconds=seconds
        )
    sizes = (found.size,) * len(chosen)
    return Picture("video", sizes, lambda: decode_frames(path, chosen), packs, seconds=seconds)


def _stacked_units(main: Sequence[int], found: VideoFacts, rules: VideoRules) -> list[tuple[int, ...]]:
    """See ``visual_units``; refuses another frame rate than one per second, which stacking counts by."""
    if rules.fps != 1:
        raise RowError(
            "video",
            f"the video is sampled at {rules.fps:g} frames per second, expected 1, since --stack_frames counts by "
            "seconds. Leave --video_fps (and fps in the row) out, or --stack_frames.",
        )
    return visual_units(
        main, found.count, found.fps, per_second=rules.stack_frames, max_num_frames=rules.max_num_frames
    )


def _path(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RowError(
            "media",
            f"a video is {reprlib.repr(value):.80}, expected a path or a list of frames. Fix the row.",
        )
    return value


def is_list_of_frames(value: Any, options: ImageOptions) -> bool:
    return isinstance(value, (list, tuple)) or find_file(_path(value), options.folder).is_dir()


def _frame_sources(value: Any, options: ImageOptions) -> list[Any]:
    if isinstance(value, (list, tuple)):
        frames = list(value)
    else:
        folder = find_file(value, options.folder)
        found = sorted(folder.iterdir(), key=_frame_number)
        frames = [str(path) for path in found if path.suffix.lower() in _FRAME_NAMES]
    if not frames:
        raise RowError(
            "video", f"video {value!r:.160} has no frames, expected images in it. Add them, or fix the path."
        )
    return frames


def _frame_number(path: Path) -> tuple[int, str]:
    """Sorts frame2.jpg in front of frame10.jpg."""
    digits = "".join(character for character in path.stem if character.isdigit())
    return int(digits or 0), path.name


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise RowError(
            "video", "videos need the package 'av' (PyAV), which is not installed. Run: pip install av"
        ) from error
    return av


@dataclass(frozen=True)
class VideoFacts:
    """What the header of a video says.

    Attributes:
        count: Frames.
        fps: Frames per second.
        size: Of its frames.
        duration: Length of the file, in seconds; its sound may be longer than its pictures.
        sounds: Whether it has sound.
    """

    count: int
    fps: float
    size: Size
    duration: float
    sounds: bool


def probe_video(path: Path) -> VideoFacts:
    """Read the header of a video.

    Raises:
        RowError: When it can't be read, or says too little.
    """
    av = _av()
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            count = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
            rate = stream.average_rate or stream.guessed_rate
            fps, size = float(rate or 0), (stream.codec_context.width, stream.codec_context.height)
            duration = (container.duration or 0) / av.time_base or (count / fps if fps else 0.0)
            found = VideoFacts(count, fps, size, duration, bool(container.streams.audio))
    except (av.FFmpegError, IndexError, OSError, ValueError) as error:
        raise film_error(path, f"can't be read ({error}), expected a film. Replace it.") from error
    if not (count and fps and all(size)):
        raise film_error(path, "has no frames or no frame rate, expected a film. Replace it.")
    return found


def decode_frames(path: Path, chosen: Sequence[int]) -> Iterator[Image.Image]:
    av = _av()
    wanted = iter(chosen)
    target = next(wanted, None)
    try:
        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "AUTO"
            for number, frame in enumerate(container.decode(video=0)):
                while target == number:
                    yield frame.to_image()
                    target = next(wanted, None)
                if target is None:
                    return
    except (av.FFmpegError, OSError, ValueError) as error:
        raise film_error(path, f"can't be decoded ({error}). Replace it.") from error
    raise film_error(path, f"ends before frame {target}, as its header counts them. Save it again.")


def film_error(path: Path, problem: str) -> RowError:
    """What is wrong with a film, as a message that names it."""
    return RowError("video", f"video {str(path)!r} {problem}")


# --- stacking what happens within each second ---


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

"""The text that stands for an image, a video or an audio in the prompt, and where its features go.

U is the run of pad tokens that one slice's features replace. Overview first, then the slices row by row;
a newline only BETWEEN rows of slices:

- V-2, 2.5: ``<image>U</image>``, and when cut ``<slice>`` + rows of ``<image>U</image>`` + ``</slice>``.
- 2.6 to 4.5: ``<image_id>i</image_id><image>U</image>`` and when cut rows of ``<slice>U</slice>``.
- InternLM-XComposer2: U alone.
- 4.6, 4.7: as 2.6, with ``<|image_pad|>`` and as many of them as the slice has merged patches.

A video is its frames' placeholders: joined by newlines up to 4.5, where a pack of frames has one placeholder;
joined by nothing and made of ``<|video_pad|>`` in 4.6 and 4.7. An audio of MiniCPM-o is
``<|audio_start|>U<|audio_end|>``, for every second (o-2.6) or once (o-4.5). A video with its sound is every frame and,
behind it, the sound up to the next one, joined by nothing.

Source: the released processors; held token by token by ``tests/goldens/test_goldens_data.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.checkpoints.xcomposer2_geometry import tile_tokens
from minicpm_tune.data.media.audio import AudioRules, Clip
from minicpm_tune.data.media.images import Picture
from minicpm_tune.data.slicing.layouts import ImageLayout
from minicpm_tune.errors import RowError

Layouts = Sequence[tuple[ImageLayout, ...]]  # of every frame of every picture


@dataclass(frozen=True)
class PlaceholderStyle:
    """How a generation writes images into the prompt.

    Attributes:
        pad: The token that is repeated to make U.
        video_pad: The same for video frames.
        query_num: Tokens per slice; 0 when they are counted from the slice's patches.
        patches_per_token: Patches that become one token, when ``query_num`` is 0.
        image_ids: Whether an image starts with its number.
        video_ids: Whether a video starts with its number.
        frame_separator: What stands between the frames of a video.
        slice_tag: The tag around a slice: ``image`` inside one ``<slice>`` wrapper, or ``slice``; empty: an
            image is one U without any tag.
    """

    pad: str = "<unk>"
    video_pad: str = "<unk>"
    query_num: int = 64
    patches_per_token: int = 1
    image_ids: bool = True
    video_ids: bool = False
    frame_separator: str = "\n"
    slice_tag: str = "slice"

    def token_count(self, size: tuple[int, int]) -> int:
        """Number of pad tokens for a slice of (rows, columns) patches."""
        return self.query_num or size[0] * size[1] // self.patches_per_token

    @property
    def tag_tokens(self) -> int:
        """Tokens around each U."""
        return 2 if self.slice_tag else 0


@dataclass(frozen=True)
class TileStyle(PlaceholderStyle):
    """4khd's placeholder: nothing but its tokens.

    Attributes:
        side: Patches on a tile's side.
    """

    side: int = 24

    def token_count(self, size: tuple[int, int]) -> int:
        """Number of pad tokens for an image of (rows, columns) patches."""
        return tile_tokens(size, self.side)


@dataclass(frozen=True)
class Placeholder:
    """The text for one image, video or audio, and its runs.

    Attributes:
        text: The text, pad tokens written out.
        runs: Per slice, [start, end) in characters of ``text``, of its pad tokens.
        audio_runs: The same for its sound.
    """

    text: str
    runs: tuple[tuple[int, int], ...]
    audio_runs: tuple[tuple[int, int], ...]


def write_placeholders(
    pictures: Sequence[Picture | Clip],
    layouts: Layouts,
    style: PlaceholderStyle,
    *,
    generation: Generation,
    audio: AudioRules | None,
) -> list[Placeholder]:
    """Write the placeholder of every medium of a sample.

    Args:
        pictures: The sample's images, videos and audios.
        layouts: How every frame of each is cut; where frames are packed, the first of each pack counts.
        style: The generation's style; image and audio share the pad token.
        generation: The checkpoint's generation.
        audio: How its audio becomes tokens; None where there is none.

    Returns:
        The texts and the runs in them, in the order of the text; those of an image as ``layout.tgt_sizes``.

    Raises:
        RowError: When an audio, or all the sound of a video, is too short for a token.
    """
    has_video = any(picture.kind == "video" for picture in pictures)
    numbered = {
        "image": style.image_ids and (generation.image_ids_beside_video or not has_video),
        "video": style.video_ids,
    }
    numbers = {"image": itertools.count(), "video": itertools.count()}
    placeholders = []
    for picture, frames in zip(pictures, layouts, strict=True):
        writer = _Writer(style)
        if isinstance(picture, Clip):
            writer.write_clip(picture, audio)
        elif picture.sound:
            writer.write_film(picture, frames, audio, generation)
        else:
            if numbered[picture.kind]:
                writer.write(f"<image_id>{next(numbers[picture.kind])}</image_id>")
            writer.write_picture(picture, frames)
        placeholders.append(writer.placeholder())
    return placeholders


class _Writer:
    """Writes one placeholder."""

    def __init__(self, style: PlaceholderStyle) -> None:
        self.style, self.pad = style, style.pad
        self.parts: list[str] = []
        self.length = 0
        self.runs: list[tuple[int, int]] = []
        self.audio_runs: list[tuple[int, int]] = []

    def write(self, text: str) -> None:
        self.parts.append(text)
        self.length += len(text)

    def write_run(self, before: str, count: int, after: str) -> tuple[int, int]:
        """Write pad tokens between two tags, and give their [start, end)."""
        self.write(before)
        start = self.length
        self.write(self.pad * count)
        run = start, self.length
        self.write(after)
        return run

    def write_clip(self, clip: Clip, rules: AudioRules | None) -> None:
        assert rules is not None, clip
        self.write_audio(rules.runs(clip.samples))
        if not self.audio_runs:
            raise RowError(
                "audio",
                f"audio {clip.name} has {clip.samples} samples of 16 kHz, expected at least {rules.fewest_samples}: "
                "fewer make no audio token. Replace it, or remove the row.",
            )

    def write_audio(self, runs: Sequence[int]) -> None:
        self.audio_runs += [self.write_run("<|audio_start|>", count, "<|audio_end|>") for count in runs]

    def write_picture(self, picture: Picture, frames: Sequence[ImageLayout]) -> None:
        if picture.kind == "video":
            self.pad = self.style.video_pad
        for place, index in enumerate(picture.pack_starts):
            if place:
                self.write(self.style.frame_separator)
            self.write_frame(frames[index])

    def write_film(
        self, film: Picture, frames: Sequence[ImageLayout], rules: AudioRules | None, generation: Generation
    ) -> None:
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
        for frame, counts in zip(frames, runs, strict=True):
            self.write(hearing.unit)
            self.write_frame(frame)
            self.write_audio(counts)
            if not counts and not hearing.per_second:  # of sound too short for a token, o-4.5 leaves the tags
                self.write("<|audio_start|><|audio_end|>")

    def write_frame(self, layout: ImageLayout) -> None:
        """Write the overview and the slices of an image or a frame."""
        tag = self.style.slice_tag
        overview, *slices = (self.style.token_count(size) for size in layout.tgt_sizes)
        if not tag:
            self.runs.append(self.write_run("", overview, ""))
            return
        self.runs.append(self.write_run("<image>", overview, "</image>"))
        if layout.grid is None:
            return
        if tag == "image":
            self.write("<slice>")
        for index, count in enumerate(slices):
            if index and index % layout.grid.columns == 0:
                self.write("\n")
            self.runs.append(self.write_run(f"<{tag}>", count, f"</{tag}>"))
        if tag == "image":
            self.write("</slice>")

    def placeholder(self) -> Placeholder:
        return Placeholder("".join(self.parts), tuple(self.runs), tuple(self.audio_runs))

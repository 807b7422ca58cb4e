"""The text that stands for an image in the prompt, and where its slices' features go.

U is the run of pad tokens that one slice's features replace. Overview first, then the slices row by row;
a newline only BETWEEN rows of slices:

- V-2, 2.5: ``<image>U</image>``, and when cut ``<slice>`` + rows of ``<image>U</image>`` + ``</slice>``.
- 2.6 to 4.5: ``<image_id>i</image_id><image>U</image>`` and when cut rows of ``<slice>U</slice>``.
- InternLM-XComposer2: U alone.
- 4.6, 4.7: as 2.6, with ``<|image_pad|>`` and as many of them as the slice has merged patches.

A video is its frames' placeholders: joined by newlines up to 4.5, where a pack of frames has one placeholder;
joined by nothing and made of ``<|video_pad|>`` in 4.6 and 4.7. A video with its sound (MiniCPM-o) is frames and
audio in turn, joined by nothing.

Source: the released processors; held token by token by ``tests/goldens/test_goldens_data.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minicpm_tune.data.slicing.layouts import ImageLayout


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
class Placeholder:
    """The text for one image or video, and its runs.

    Attributes:
        text: The text, pad tokens written out.
        runs: Per slice, [start, end) in characters of ``text``, of its pad tokens.
        pad_length: Characters of one pad token.
    """

    text: str
    runs: tuple[tuple[int, int], ...]
    pad_length: int


def image_placeholder(layout: ImageLayout, style: PlaceholderStyle, *, number: int | None) -> Placeholder:
    """Write the placeholder of one image.

    Args:
        layout: The image's layout.
        style: The generation's style.
        number: The image's number in the sample, counted from 0; ``None`` writes none.

    Returns:
        The text and the runs in it, one per slice, in the order of ``layout.tgt_sizes``.
    """
    writer = _Writer(style.pad)
    if number is not None:
        writer.write(f"<image_id>{number}</image_id>")
    _write_image(writer, layout, style)
    return writer.placeholder()


def video_placeholder(
    layouts: Sequence[ImageLayout], style: PlaceholderStyle, *, number: int | None
) -> Placeholder:
    """Write the placeholder of one video.

    Args:
        layouts: The layout of each frame, or, where frames are packed, of each pack's first frame.
        style: The generation's style.
        number: The video's number in the sample, counted from 0; ``None`` writes none.

    Returns:
        The text and the runs in it.
    """
    writer = _Writer(style.video_pad)
    if number is not None:
        writer.write(f"<image_id>{number}</image_id>")
    for index, layout in enumerate(layouts):
        if index:
            writer.write(style.frame_separator)
        _write_image(writer, layout, style)
    return writer.placeholder()


def audio_placeholder(runs: Sequence[int], style: PlaceholderStyle) -> Placeholder:
    """Write the placeholder of one audio of MiniCPM-o.

    Args:
        runs: Audio tokens of each run: of every second (o-2.6), or of the whole audio (o-4.5).
        style: The generation's style; image and audio share the pad token.

    Returns:
        The text and the runs in it.
    """
    writer = _Writer(style.pad)
    for count in runs:
        writer.write_run("<|audio_start|>", count, "<|audio_end|>")
    return writer.placeholder()


def film_placeholder(
    layouts: Sequence[ImageLayout],
    runs: Sequence[Sequence[int]],
    style: PlaceholderStyle,
    *,
    unit: str,
    tags_alone: bool,
) -> Placeholder:
    """Write the placeholder of a video with its sound: every frame, and behind it the sound up to the next one.

    Args:
        layouts: The layout of each frame.
        runs: Audio tokens of each run of the sound behind each frame.
        style: The generation's style.
        unit: What stands in front of every frame.
        tags_alone: Whether sound too short for a token leaves its tags (o-4.5), or nothing (o-2.6).

    Returns:
        The text and the runs in it, in the order of the text.
    """
    writer = _Writer(style.pad)
    for layout, counts in zip(layouts, runs, strict=True):
        writer.write(unit)
        _write_image(writer, layout, style)
        for count in counts:
            writer.write_run("<|audio_start|>", count, "<|audio_end|>")
        if not counts and tags_alone:
            writer.write("<|audio_start|><|audio_end|>")
    return writer.placeholder()


def _write_image(writer: _Writer, layout: ImageLayout, style: PlaceholderStyle) -> None:
    overview, *slices = (style.token_count(size) for size in layout.tgt_sizes)
    if not style.slice_tag:
        writer.write_run("", overview, "")
        return
    writer.write_run("<image>", overview, "</image>")
    if layout.grid is None:
        return
    wrapped = style.slice_tag == "image"
    if wrapped:
        writer.write("<slice>")
    for index, count in enumerate(slices):
        if index and index % layout.grid.columns == 0:
            writer.write("\n")
        writer.write_run(f"<{style.slice_tag}>", count, f"</{style.slice_tag}>")
    if wrapped:
        writer.write("</slice>")


class _Writer:
    def __init__(self, pad: str) -> None:
        self.pad = pad
        self.parts: list[str] = []
        self.length = 0
        self.runs: list[tuple[int, int]] = []

    def write(self, text: str) -> None:
        self.parts.append(text)
        self.length += len(text)

    def write_run(self, before: str, count: int, after: str) -> None:
        self.write(before)
        start = self.length
        self.write(self.pad * count)
        self.runs.append((start, self.length))
        self.write(after)

    def placeholder(self) -> Placeholder:
        return Placeholder("".join(self.parts), tuple(self.runs), len(self.pad))

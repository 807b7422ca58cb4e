"""``--stack_frames`` against transformers' own video processor of 4.6."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.minicpmv4_6.video_processing_minicpmv4_6 import MiniCPMV4_6VideoProcessor
from transformers.video_utils import VideoMetadata

from minicpm_tune.data.media.images import ImageOptions
from minicpm_tune.data.media.videos import (
    VideoRules,
    choose_frames,
    composite,
    composite_size,
    open_video,
    pictures_of,
    visual_units,
)
from minicpm_tune.errors import DataError, RowError
from support.golden_checkpoints import processing

FPS = 24.0


def units_of(count, per_second, most=128):
    main, _ = choose_frames(count, FPS, VideoRules("seconds", 1.0, most, 9))
    return visual_units(main, count, FPS, per_second=per_second, max_num_frames=most)


class UnitsMadeError(Exception):
    """Ends the processor's work when its pictures are made; resizing them would need torchvision."""


def units_of_transformers(count, per_second, most, monkeypatch):
    """The frames of every picture that transformers' processor makes of a film, in order."""
    metadata = VideoMetadata(total_num_frames=count, fps=FPS, duration=count / FPS)
    processor = MiniCPMV4_6VideoProcessor()
    indices = processor.sample_frames(metadata, max_num_frames=most, stack_frames=per_second)
    video = torch.tensor(indices).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 6)  # a frame's pixels are its number
    made = []

    def concat(frames):
        return tuple(frames[:, 0, 0, 0].tolist())

    def group(units):
        made.extend(unit if isinstance(unit, tuple) else concat(unit) for unit in units)
        raise UnitsMadeError

    monkeypatch.setattr(processor, "concat_frames_as_image", concat)
    monkeypatch.setattr(f"{MiniCPMV4_6VideoProcessor.__module__}.group_videos_by_shape", group)
    with pytest.raises(UnitsMadeError):
        processor._preprocess(
            [video], do_convert_rgb=False, do_resize=False, resample=None, do_rescale=False, rescale_factor=1.0,
            do_normalize=False, image_mean=None, image_std=None, max_slice_nums=9, scale_resolution=448,
            patch_size=14, slice_mode=True, stack_frames=per_second, max_num_frames=most,
            video_metadata=[metadata], return_tensors=None,
        )  # fmt: skip
    return made


@pytest.mark.parametrize("per_second", [2, 3, 5])
@pytest.mark.parametrize("seconds", [0.4, 1.0, 7.3, 20.0, 61.7])
def test_pictures_are_those_of_transformers(seconds, per_second, monkeypatch):
    count, most = round(seconds * FPS), 20
    expected = units_of_transformers(count, per_second, most, monkeypatch)
    assert units_of(count, per_second, most) == expected


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (50, 50), (200, 20)])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_a_composite_is_that_of_transformers(count, size):
    generator = np.random.default_rng(count)
    frames = generator.integers(0, 255, (count, size[1], size[0], 3), dtype=np.uint8)
    expected = MiniCPMV4_6VideoProcessor().concat_frames_as_image(
        torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
    )
    made = composite([Image.fromarray(frame) for frame in frames])
    assert made.size == composite_size(count, size)
    assert np.array_equal(np.asarray(made), expected[0].permute(1, 2, 0).numpy())


def test_frames_are_taken_in_any_order_and_only_once():
    units = [(5,), (1, 2), (2,), (9, 1)]
    images = {number: Image.new("RGB", (4, 4), (number, 0, 0)) for number in (1, 2, 5, 9)}
    made = list(pictures_of(units, sorted(images), iter(images[number] for number in sorted(images))))
    assert [image.getpixel((0, 0))[0] for image in made] == [5, 1, 2, 9]
    assert [image.size for image in made] == [
        (4, 4),
        composite_size(2, (4, 4)),
        (4, 4),
        composite_size(2, (4, 4)),
    ]


def test_a_film_is_stacked(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(8):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (30 * number, 0, 0)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    rules = processing("v4_6", stack_frames=2).media.video
    picture = open_video("film.mp4", ImageOptions(tmp_path), rules)
    frames = list(picture.frames())
    assert [frame.size for frame in frames] == list(picture.sizes) == [(64, 48)] * 4
    reds = [frame.getpixel((32, 24))[0] for frame in frames]
    assert reds == pytest.approx([0, 60, 120, 180], abs=12)
    with pytest.raises(
        RowError, match=r"sampled at 2 frames per second, expected 1, since --stack_frames counts"
    ):
        open_video("film.mp4", ImageOptions(tmp_path), rules.for_one(2.0, None))


def test_other_generations_refuse_it():
    with pytest.raises(
        DataError, match=r"--stack_frames: MiniCPM-V 2\.6 has none, expected MiniCPM-V 4\.6 or 4\.7"
    ):
        processing("v2_6", stack_frames=2)
    with pytest.raises(DataError, match="--stack_frames: found 0, expected at least 1"):
        processing("v4_6", stack_frames=0)

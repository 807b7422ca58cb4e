"""Videos: which frames are used, and how they stand in the prompt of each generation."""

import sys

import numpy as np
import pytest
from PIL import Image

from dataset import SupervisedDataset, data_collator
from minicpm_tune.data.media.videos import VideoRules, choose_frames
from minicpm_tune.data.row_check import check_rows
from minicpm_tune.errors import DataError, RowError
from support.golden_checkpoints import processing, supervised_text
from support.rows import chat, write_rows

STEP = VideoRules("step", 1.0, 64, 2)
PACKS = VideoRules("packs", 3.0, 180, 1, max_frames_per_pack=3)
SECONDS = VideoRules("seconds", 1.0, 128, 9)


def write_film(path, *, seconds=3, fps=10, size=(96, 64)):
    """A film whose frame n has brightness 8 * n."""
    import av

    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(seconds * fps):
            pixels = np.full((size[1], size[0], 3), 8 * number % 256, dtype=np.uint8)
            film.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        film.mux(stream.encode(None))


def write_frames(folder, count, size=(96, 64)):
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", size, (8 * number % 256,) * 3).save(folder / f"frame{number}.png")
    return folder


def dataset(tmp_path, rows, name, **options):
    return SupervisedDataset(write_rows(tmp_path, rows), processing(name, **options))


def prompt_text(rows, sample):
    """The prompt with every run of pad tokens folded to U."""
    style = rows.processing.style
    text = rows.processing.tokenizer.decode(sample["input_ids"])
    for pad in {style.pad, style.video_pad}:
        while pad * 2 in text:
            text = text.replace(pad * 2, pad)
        text = text.replace(pad, "U")
    return text


# --- which frames ---


@pytest.mark.parametrize(
    ("count", "fps", "rules", "expected"),
    [
        (100, 25.0, STEP, [0, 25, 50, 75]),
        (10, 0.5, STEP, list(range(10))),
        (6400, 1.0, VideoRules("step", 1.0, 4, 2), [800, 2400, 4000, 5600]),
        (100, 25.0, VideoRules("step", 5.0, 64, 2), list(range(0, 100, 5))),
        (95, 30.0, SECONDS, [0, 30, 60, 90]),
        (100, 25.0, VideoRules("seconds", 2.0, 128, 9), [0, 12, 25, 37, 50, 62, 75, 87]),
    ],
)
def test_frames_are_chosen_as_the_released_inference_does(count, fps, rules, expected):
    assert choose_frames(count, fps, rules) == (expected, None)


@pytest.mark.parametrize("seconds", [1.0, 60.3, 127.9, 128.0, 128.4, 400.7])
def test_frames_of_4_6_equal_transformers_own_choice(seconds):
    from transformers.models.minicpmv4_6.video_processing_minicpmv4_6 import MiniCPMV4_6VideoProcessor
    from transformers.video_utils import VideoMetadata

    count = round(seconds * 24)
    metadata = VideoMetadata(total_num_frames=count, fps=24.0, duration=count / 24.0)
    expected = MiniCPMV4_6VideoProcessor.sample_frames(
        None, metadata, max_num_frames=128, stack_frames=1
    )  # reads nothing of the instance when both limits are given
    assert choose_frames(count, 24.0, SECONDS)[0] == expected


def test_4_5_packs_neighbors_of_long_videos_only():
    frames, packs = choose_frames(300, 30.0, PACKS)  # 10 s: 30 frames, one to a pack
    assert (len(frames), [len(pack) for pack in packs]) == (30, [1] * 30)
    frames, packs = choose_frames(30 * 100, 30.0, PACKS)  # 100 s: 300 frames in pairs
    assert (len(frames), {len(pack) for pack in packs}) == (300, {2})
    frames, packs = choose_frames(30 * 600, 30.0, PACKS)  # 10 min: 540 frames in threes
    assert (len(frames), len(packs), {len(pack) for pack in packs}) == (540, 180, {3})
    times = [time for pack in packs for time in pack]
    assert times == sorted(times)
    assert (times[0], times[-1]) == (
        5,
        5993,
    )  # tenths of a second, cut off as the released code does (599.4 / 0.1)


def test_a_video_shorter_than_a_frame_step_still_gives_a_frame():
    for rules in (STEP, PACKS, SECONDS):
        assert len(choose_frames(2, 30.0, rules)[0]) >= 1


# --- in the prompt ---


@pytest.mark.parametrize("name", ["v2_6", "o2_6", "v4"])
def test_frames_stand_one_below_the_other_without_ids(name, tmp_path):
    write_film(tmp_path / "a.mp4")
    rows = dataset(tmp_path, [{"video": "a.mp4", "conversations": chat("<video>\nWhat?", "Light.")}], name)
    sample = rows[0]
    assert "<image>U</image>\n<image>U</image>\n<image>U</image>\nWhat?" in prompt_text(rows, sample)
    assert supervised_text(sample, rows.processing.tokenizer) == "Light.<|im_end|>"
    means = [strip.float().mean().item() for strip in sample["pixel_values"].chunk(3, dim=2)]
    assert np.allclose(means, [0, 80, 160], atol=6)  # frames 0, 10 and 20


def test_an_image_beside_a_video_has_no_id_either(tmp_path):
    write_film(tmp_path / "a.mp4", seconds=1)
    Image.new("RGB", (30, 20)).save(tmp_path / "b.png")
    row = {"video": "a.mp4", "image": "b.png", "conversations": chat("<image> or <video>?", "x")}
    rows = dataset(tmp_path, [row], "v2_6")
    text = prompt_text(rows, rows[0])
    assert "<image>U</image> or <image>U</image>?" in text
    assert "<image_id>" not in text


def test_4_5_gives_every_pack_one_placeholder_and_every_frame_its_time(tmp_path):
    frames = write_frames(tmp_path / "frames", 7)
    Image.new("RGB", (896, 896)).save(tmp_path / "b.png")  # cut into slices
    row = {"video": str(frames), "image": "b.png", "conversations": chat("<image> <video> What?", "x")}
    rows = dataset(tmp_path, [row, {"conversations": chat("Hi", "x")}], "v4_5", max_num_frames=3)
    sample = rows[0]
    assert prompt_text(rows, sample).count("<image>U</image>\n<image>U</image>\n<image>U</image> What?") == 1
    stills = len(sample["tgt_sizes"]) - 7
    assert stills == 5
    assert len(sample["image_bound"]) == stills + 3
    runs, times = sample["temporal_ids"].T.tolist()
    assert runs == [0, 1, 2, 3, 4, 5, 5, 5, 6, 6, 6, 7]
    assert times == [-1] * 5 + [0, 3, 7, 10, 13, 17, 20]

    batch = data_collator([rows[1], sample, sample])
    assert batch["temporal_ids"][:, 0].tolist() == runs + [run + 8 for run in runs]
    still = SupervisedDataset(
        write_rows(tmp_path, [{"image": "b.png", "conversations": chat("Hi", "x")}], "b.json"),
        rows.processing,
    )[0]
    batch = data_collator([still, sample])
    assert batch["temporal_ids"].tolist()[:6] == [[0, -1], [1, -1], [2, -1], [3, -1], [4, -1], [5, -1]]


@pytest.mark.parametrize(("name", "prefix"), [("v4_6", "<image_id>0</image_id>"), ("v4_7", "")])
def test_native_videos_are_made_of_video_tokens(name, prefix, tmp_path):
    write_film(tmp_path / "a.mp4", seconds=2)
    rows = dataset(tmp_path, [{"video": "a.mp4", "conversations": chat("<video>What?", "x")}], name)
    sample = rows[0]
    assert f"user\n{prefix}<image>U</image><image>U</image>\nWhat?" in prompt_text(rows, sample)
    tokenizer = rows.processing.tokenizer
    pad = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    first = sample["image_bound"][0, 0]
    assert sample["input_ids"][first] == pad
    if name == "v4_7":
        assert sample["mm_token_type_ids"].tolist() == [
            2 * (token == pad) for token in sample["input_ids"].tolist()
        ]


def test_frame_lists_and_frame_folders_are_videos(tmp_path):
    write_frames(tmp_path / "frames", 11)
    listed = {"video": [f"frames/frame{n}.png" for n in range(11)], "conversations": chat("What?", "x")}
    folder = {"video": "frames", "conversations": chat("What?", "x")}
    rows = dataset(tmp_path, [listed, folder], "v2_6")
    assert rows[0]["pixel_values"].equal(rows[1]["pixel_values"])
    assert len(rows[0]["tgt_sizes"]) == 11


def test_fps_and_the_limit_of_frames_are_options(tmp_path):
    write_film(tmp_path / "a.mp4", seconds=3)
    row = {"video": "a.mp4", "conversations": chat("What?", "x")}
    assert len(dataset(tmp_path, [row], "v2_6", video_fps=2.0)[0]["tgt_sizes"]) == 6
    assert len(dataset(tmp_path, [row], "v2_6", max_num_frames=2)[0]["tgt_sizes"]) == 2


def test_a_long_video_is_cut_whole_or_not_at_all(tmp_path):
    write_film(tmp_path / "a.mp4", seconds=3)
    row = {"video": "a.mp4", "conversations": chat("Hi", "Yes.", "And <video>?", "x")}
    whole = dataset(tmp_path, [row], "v2_6")[0]
    limit = int(whole["image_bound"][1, 0]) + 3  # inside the second frame
    sample = dataset(tmp_path, [row], "v2_6", model_max_length=limit)[0]
    assert len(sample["input_ids"]) == int(whole["image_bound"][0, 0]) - 1  # in front of the first <image>
    assert len(sample["tgt_sizes"]) == len(sample["image_bound"]) == sample["pixel_values"].shape[2] == 0


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ("none.mp4", "video 'none.mp4' not found"),
        ("text.mp4", "text.mp4' can't be read"),
        ("empty.mp4", "has 0 bytes, expected a whole video"),
        ("folder", "has no frames, expected images in it"),
        (["none.png"], "image 'none.png' not found"),
        ([7], "an image is 7, expected a path"),
        (7, "a video is 7, expected a path or a list of frames"),
    ],
)
def test_videos_that_cannot_be_used_are_named(video, message, tmp_path):
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    rows = dataset(tmp_path, [{"video": video, "conversations": chat("What?", "x")}], "v2_6")
    with pytest.raises(DataError, match=message):
        check_rows(rows)


def test_a_film_that_ends_early_is_left_out_in_training(tmp_path):
    write_film(tmp_path / "a.mp4", seconds=3)
    row = {"video": "a.mp4", "conversations": chat("What?", "x")}
    rows = dataset(tmp_path, [row], "v2_6", check_images="header")
    check_rows(rows)
    plan = rows.plan(0)
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RowError, match=r"a\.mp4' (can't be decoded|ends before frame)"):
        list(plan.pictures[0].frames())
    assert rows[0]["origin"] is None


def test_a_missing_video_package_is_named(tmp_path, monkeypatch):
    write_film(tmp_path / "a.mp4", seconds=1)
    monkeypatch.setitem(sys.modules, "av", None)
    rows = dataset(tmp_path, [{"video": "a.mp4", "conversations": chat("What?", "x")}], "v2_6")
    with pytest.raises(DataError, match=r"need the package 'av'.*Run: pip install av"):
        check_rows(rows)


def test_a_video_part_may_set_its_own_frame_rate_and_most_frames(tmp_path):
    write_film(tmp_path / "a.mp4", seconds=3)

    def frames(**wishes):
        part = {"type": "video", "video": "a.mp4", **wishes}
        messages = [{"role": "user", "content": [part, "What?"]}, *chat("", "x")[1:]]
        rows = dataset(tmp_path, [{"messages": messages}], "v2_6")
        return len(rows.plan(0).pictures[0].sizes)

    assert frames() == 3
    assert frames(fps=2) == 6
    assert frames(video_fps=5.0, max_frames=4) == 4
    assert frames(fps=None, max_num_frames=2) == 2

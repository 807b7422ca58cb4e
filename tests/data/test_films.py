"""Videos with their sound: how they are cut, and that a sample is what the released omni form gives."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from dataset import SupervisedDataset
from minicpm_tune.data.media.audio import RATE, open_audio
from minicpm_tune.data.media.films import FilmRules, plan_film
from minicpm_tune.data.media.images import Picture
from minicpm_tune.data.turns import Media, Turn
from minicpm_tune.errors import DataError, RowError
from support.films import write_film
from support.golden_checkpoints import processing
from support.golden_models import HEARING
from support.paths import GOLDENS, IMAGES
from support.rows import chat, write_rows

UNITS = FilmRules(units=True, max_num_frames=None)
SEGMENTS = FilmRules(units=False, max_num_frames=64)


@pytest.mark.parametrize(
    ("count", "duration", "expected"),
    [
        # What get_frame of moviepy 2.2.1 gave for the guide's times on films made like those here.
        (50, 5.364, [10, 20, 30, 40, 40, 40]),
        (47, 4.7, [10, 20, 30, 40, 40]),
        (50, 5.064, [10, 20, 30, 40, 40, 40]),
        (7, 0.7, [0]),
    ],
)
def test_units_end_with_their_frame_and_last_as_long_as_the_file(count, duration, expected):
    plan = plan_film(count, 10.0, duration, UNITS)
    assert plan.frames == expected
    assert plan.starts == [RATE * second for second in range(len(expected))]
    assert plan.end == int(int(duration * 100) / 100 * RATE)


def test_segments_begin_with_their_frame_and_last_as_long_as_the_pictures():
    plan = plan_film(50, 10.0, 5.364, SEGMENTS)
    assert (plan.frames, plan.starts, plan.end) == (
        [0, 10, 20, 30, 40],
        [0, 16000, 32000, 48000, 64000],
        80000,
    )
    # 29.97 frames per second: the frame is cut down, not rounded.
    assert plan_film(100, 29.97, 3.4, SEGMENTS).frames == [0, 29, 59, 89]


def test_a_longer_film_gives_64_frames_at_tenths_of_a_second():
    plan = plan_film(1300, 10.0, 130.0, SEGMENTS)
    assert len(plan.frames) == len(plan.starts) == 64
    assert plan.frames[:4] == [0, 20, 41, 61]
    assert plan.starts[:4] == [0, 32000, 65600, 97600]
    assert (plan.frames[-1], plan.starts[-1], plan.end) == (1299, 2078400, 2080000)
    # 64 s are not too long, and o-2.6 has no limit of its own.
    assert plan_film(640, 10.0, 64.0, SEGMENTS).frames == list(range(0, 640, 10))
    assert len(plan_film(1300, 10.0, 130.0, UNITS).frames) == 130
    assert plan_film(1300, 10.0, 130.0, replace(UNITS, max_num_frames=2)).starts == [0, 129 * RATE]


def omni_case(name):
    cases = json.loads((GOLDENS / name / "processor.json").read_text(encoding="utf-8"))["cases"]
    [case] = [case for case in cases.values() if (case.get("options") or {}).get("omni") and case["images"]]
    return case


@pytest.mark.parametrize("name", HEARING)
def test_a_film_is_the_released_omni_prompt(name):
    """The golden's images and audios as the frames and the sound of one film."""
    case = omni_case(name)
    found = processing(name)
    # The golden's prompt has no units: its user wrote none.
    found = replace(
        found, generation=replace(found.generation, hearing=replace(found.generation.hearing, unit=""))
    )
    images = [Image.open(IMAGES / f"{image}.png").convert("RGB") for image in case["images"]]
    clips = [open_audio(str(GOLDENS / "audio" / f"{wave}.wav"), IMAGES) for wave in case["audios"]]
    film = Picture("video", tuple(image.size for image in images), lambda: images, sound=tuple(clips))
    text = case["messages"][0]["content"].rpartition(">")[2]
    sample = found.encode_prompt([Turn("user", (Media("video", 0, sound=True), text))], [film])
    assert sample["input_ids"].tolist() == case["generation_ids"]
    assert sample["tgt_sizes"].tolist() == case["tgt_sizes"]
    assert sample["image_bound"].tolist() == case["image_bound"]
    assert sample["audio_bound"].tolist() == case["audio_bounds"]
    assert sample["audio_segments"][:, 0].tolist() == case["audio_feature_lens"]  # heard as one waveform


def row(path, text="<video>What happens?", **keys):
    return {"video": str(path), "conversations": chat(text, "A cat."), **keys}


def dataset(tmp_path, rows, name, **options):
    return SupervisedDataset(write_rows(tmp_path, rows), processing(name, **options))


def test_a_row_has_frames_and_sound_in_turn_where_it_asks_for_it(tmp_path):
    write_film(tmp_path / "a.mkv")
    mute, heard = row("a.mkv"), row("a.mkv", use_audio=True)
    rows = dataset(tmp_path, [mute, heard], "o4_5")
    assert "audio_values" not in rows[0]
    sample = rows[1]
    text = rows.processing.tokenizer.decode(sample["input_ids"]).replace("<unk>", "")
    piece = "<image></image><|audio_start|><|audio_end|>"
    assert text.startswith("<|im_start|>user\n" + piece * 5 + "What happens?<|im_end|>\n")
    assert text.endswith("<|tts_bos|>A cat.<|im_end|>\n")
    assert [end - start for start, end in sample["audio_bound"].tolist()] == [10, 10, 10, 10, 2]
    assert len(sample["tgt_sizes"]) == 5
    # One waveform: the sound of 4.2 s.
    assert sample["audio_segments"].tolist() == [[420, 420, 42]]
    flagged = dataset(tmp_path, [mute, row("a.mkv", use_audio=False)], "o4_5", video_sound=True)
    assert flagged[0]["input_ids"].tolist() == sample["input_ids"].tolist()
    assert flagged[1]["input_ids"].tolist() == rows[0]["input_ids"].tolist()
    parts = [
        {"type": "video", "video": "a.mkv", "use_audio": True},
        {"type": "text", "text": "What happens?"},
    ]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]
    assert (
        dataset(tmp_path, [{"messages": messages}], "o4_5")[0]["input_ids"].tolist()
        == sample["input_ids"].tolist()
    )
    unmentioned = row("a.mkv", text="What happens?", use_audio=True)
    assert dataset(tmp_path, [unmentioned], "o4_5")[0]["input_ids"].tolist() == sample["input_ids"].tolist()


def test_units_stand_in_front_of_every_second_and_silence_fills_the_sound_up(tmp_path):
    write_film(tmp_path / "a.mkv", frames=25, seconds=1.5)
    rows = dataset(tmp_path, [row("a.mkv", use_audio=True)], "o2_6_audio")
    sample = rows[0]
    text = rows.processing.tokenizer.decode(sample["input_ids"]).replace("<unk>", "")
    assert text.count("<unit><image></image><|audio_start|><|audio_end|>") == 3
    assert text.startswith("<|im_start|>user\n<unit>")
    assert [end - start for start, end in sample["audio_bound"].tolist()] == [25, 25, 12]
    assert sample["audio_segments"][:, 0].tolist() == [250]


def test_sound_too_short_for_a_token_leaves_tags_or_nothing(tmp_path):
    """The sound ends after 1.2 s; the last piece of o-4.5 is filled up to 0.1 s."""
    write_film(tmp_path / "a.mkv", frames=40, seconds=1.2)
    rows = dataset(tmp_path, [row("a.mkv", use_audio=True)], "o4_5")
    sample = rows[0]
    text = rows.processing.tokenizer.decode(sample["input_ids"]).replace("<unk>", "")
    assert text.count("<image></image><|audio_start|><|audio_end|>") == 4
    assert [end - start for start, end in sample["audio_bound"].tolist()] == [10, 2, 1]
    assert int(sample["audio_segments"][:, 2].sum()) == 13


def test_measures_and_cuts_take_the_film_as_a_whole(tmp_path):
    write_film(tmp_path / "a.mkv")
    rows = dataset(tmp_path, [row("a.mkv", use_audio=True)], "o4_5")
    plan = rows.plan(0)
    assert plan.encoded.audio_tokens == 42 + 2 * 5
    assert sum(clip.samples for clip in plan.clips) == round(4.2 * RATE)
    limit = len(rows[0]["input_ids"]) - 40
    cut = dataset(tmp_path, [row("a.mkv", use_audio=True)], "o4_5")
    cut = replace(cut.processing, arguments=replace(cut.processing.arguments, model_max_length=limit))
    with pytest.raises(RowError, match="expected an answer to learn"):
        cut.fit(plan)


def test_the_text_of_the_conversation_is_that_of_rows_with_audio(tmp_path):
    write_film(tmp_path / "a.mkv")
    plain = dataset(tmp_path, [row("a.mkv", use_audio=True)], "o4_5", audio_prompt="plain")
    assert "<|tts_bos|>" not in plain.processing.tokenizer.decode(plain[0]["input_ids"])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            row("mute.mkv", use_audio=True),
            r"mute\.mkv' has no sound, expected some\. Set \"use_audio\": false",
        ),
        (row("a.mkv", use_audio="yes"), r"'use_audio' is 'yes', expected true or false"),
        (row("frames", use_audio=True), "a list or a folder of frames, which has no sound"),
        ({"conversations": chat("Hi", "Yes."), "use_audio": True}, "'use_audio' but no video"),
        (row("short.mkv", use_audio=True), "expected enough for an audio token"),
    ],
)
def test_rows_whose_sound_is_not_there_are_bad_rows(made, message, tmp_path):
    write_film(tmp_path / "a.mkv", frames=5, seconds=0.5)
    write_film(tmp_path / "mute.mkv", frames=5, seconds=0)
    write_film(tmp_path / "short.mkv", frames=1, fps=100, seconds=0.01)
    (tmp_path / "frames").mkdir()
    rows = dataset(tmp_path, [made], "o2_6_audio")
    with pytest.raises(RowError, match=message):
        rows.plan(0)


def test_another_frame_rate_and_a_model_that_does_not_hear_are_refused(tmp_path):
    write_film(tmp_path / "a.mkv", frames=5, seconds=0.5)
    with pytest.raises(RowError, match="sampled at 2 frames per second, expected 1, since with its sound"):
        dataset(tmp_path, [row("a.mkv", use_audio=True)], "o4_5", video_fps=2.0).plan(0)
    with pytest.raises(RowError, match=r"has audio, but MiniCPM-V 2\.6 takes no audio here"):
        dataset(tmp_path, [row("a.mkv", use_audio=True)], "v2_6").plan(0)
    with pytest.raises(
        DataError, match=r"--video_sound true: MiniCPM-V 2\.6 takes no audio, expected MiniCPM-o"
    ):
        processing("v2_6", video_sound=True)

"""Audio: decoded to one channel at 16 kHz, cut, and turned into frames and counts as the released processor does."""

import base64
import io
import json
import wave

import numpy as np
import pytest

from minicpm_tune.data.media.audio import (
    LONGEST_SEGMENT,
    RATE,
    AudioRules,
    Clip,
    log_mel,
    mel_frames,
    merged,
    open_audio,
)
from minicpm_tune.errors import RowError
from support.paths import GOLDENS

AUDIO = GOLDENS / "audio"
WAVES = ("half", "noise", "odd", "one", "short", "six", "speech", "two")
# The Fourier transform rounds differently on other processors; the logarithm enlarges that where it is quiet.
MEL_TOLERANCE = 2e-4  # 5.8e-5 (one.wav)
# soxr's own filter and PyAV's decoder: a resampled sine against the sine itself, away from the ends.
RESAMPLING_TOLERANCE = 2e-3  # 4.1e-4
GENERATIONS = {"o2_6_audio": 2, "o4_5": 5}  # encoder frames of an audio token


@pytest.mark.parametrize("name", WAVES)
def test_frames_are_those_of_the_released_processor(name):
    clip = open_audio(f"{name}.wav", AUDIO)
    (found,) = log_mel([clip.decode()])
    expected = np.load(AUDIO / "mel.npz")[name]
    assert found.shape == expected.shape
    error = np.abs(found - expected).max()
    print(f"\n{name}: {error:.1e}")
    assert error < MEL_TOLERANCE


@pytest.mark.parametrize("generation", GENERATIONS)
def test_counts_are_those_of_the_released_processor(generation):
    table = json.loads((GOLDENS / generation / "audio_lengths.json").read_text())
    assert table["pool_step"] == GENERATIONS[generation]
    by_second = AudioRules(table["pool_step"], per_second=True)
    whole = AudioRules(table["pool_step"], per_second=False)
    assert len(table["rows"]) == 84
    for row in table["rows"]:
        samples = row["samples"]
        cuts = range(0, samples, LONGEST_SEGMENT)
        assert [mel_frames(min(samples - cut, LONGEST_SEGMENT)) for cut in cuts] == row["mel_frames"]
        assert by_second.runs(samples) == row["chunked"]
        assert [whole.tokens(samples)] == row["whole"]
        assert whole.tokens(samples) == sum(row["feature_tokens"])


@pytest.mark.parametrize(("pool", "fewest"), [(2, 321), (5, 1281)])
def test_the_shortest_audio_that_has_a_token(pool, fewest):
    rules = AudioRules(pool, per_second=False)
    assert rules.fewest_samples == fewest
    assert (rules.tokens(fewest - 1), rules.tokens(fewest)) == (0, 1)


def test_long_audio_is_cut_every_thirty_seconds():
    parts = log_mel([np.zeros(LONGEST_SEGMENT + 161, np.float32)])
    assert [part.shape for part in parts] == [(80, 3000), (80, 2)]


def test_audios_of_one_message_become_one_waveform():
    clips = [Clip.of(np.full(3, value, np.float32)) for value in (1, 2, 3)]
    first, second = merged(clips, [0, 0, 2])
    assert first.tolist() == [1, 1, 1, 2, 2, 2]
    assert second.tolist() == [3, 3, 3]


def sine(rate, seconds=0.5, channels=1):
    times = np.arange(int(rate * seconds)) / rate
    return np.stack([np.sin(2 * np.pi * 440 * times)] * channels, axis=1) * 0.5


def wave_bytes(rate=RATE, channels=1, samples=None):
    samples = sine(rate, channels=channels) if samples is None else samples
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return out.getvalue()


def encoded(form, rate, channels):
    """A sine in the form that a file ending names, through PyAV."""
    av = pytest.importorskip("av")
    out = io.BytesIO()
    codec = {"flac": "flac", "mp3": "libmp3lame", "mp4": "aac", "wav": "pcm_f32le"}[form]
    with av.open(out, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout = "stereo" if channels == 2 else "mono"
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(sine(rate, channels=channels).T.astype(np.float32)),
            "fltp",
            layout=stream.layout.name,
        )
        frame.sample_rate = rate
        for part in (frame, None):
            for block in (
                av.AudioResampler(stream.format.name, stream.layout.name, rate).resample(part)
                if part
                else [None]
            ):
                container.mux(stream.encode(block))
    return out.getvalue()


@pytest.mark.parametrize(("rate", "channels"), [(RATE, 1), (RATE, 2), (8_000, 1), (44_100, 2), (48_000, 1)])
def test_any_rate_and_several_channels_become_one_channel_at_16_khz(rate, channels):
    pytest.importorskip("soxr")
    found = open_audio(wave_bytes(rate, channels), AUDIO).decode()
    assert found.dtype == np.float32
    assert abs(len(found) - RATE // 2) <= 1
    inner = slice(400, 7600)  # a filter has no neighbors at the ends
    assert np.abs(found[inner] - sine(RATE)[inner, 0]).max() < RESAMPLING_TOLERANCE


@pytest.mark.parametrize("form", ["flac", "mp3", "mp4", "wav"])
def test_other_forms_are_decoded(form):
    found = open_audio(encoded(form, 22_050, 2), AUDIO)
    assert 0.45 < found.seconds < 0.6
    middle = found.decode()[3000:5000]
    assert 0.4 < np.abs(middle).max() < 0.6


def test_every_source_of_audio_gives_the_same_samples(tmp_path):
    data = wave_bytes()
    (tmp_path / "a.wav").write_bytes(data)
    expected = open_audio("a.wav", tmp_path).decode()
    uri = "data:audio/wav;base64," + base64.b64encode(data).decode()
    sources = (
        data,
        uri,
        {"bytes": data, "path": None},
        {"path": "a.wav"},
        {"array": expected, "sampling_rate": RATE},
    )
    for source in sources:
        np.testing.assert_array_equal(open_audio(source, tmp_path).decode(), expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"no sound at all" * 20, "can't be decoded .* expected a whole audio file"),
        ({"array": [0.0, 1.0], "sampling_rate": None}, "sampling_rate None"),
        ({"array": [float("nan")], "sampling_rate": RATE}, "values that are no numbers"),
        ({"array": [], "sampling_rate": RATE}, "0 samples"),
        ("missing.wav", "missing.wav"),
    ],
)
def test_bad_audio_is_a_bad_row(value, message, tmp_path):
    with pytest.raises(RowError, match=message):
        open_audio(value, tmp_path)

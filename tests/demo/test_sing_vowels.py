"""The demo's sung vowels and questions."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from draw_pictures import chance
from minicpm_tune.data.media.audio import open_audio
from sing_vowels import QUESTIONS, RATE, VOWELS, WAYS, Singer, Song, sentences, sing, sing_data_set

SINGER = Singer(pitch=120.0, glide=0.0, size=1.0, breath=0.02, loudness=0.8, seconds=0.5)


def test_the_data_set_has_both_questions_about_clips_in_three_parts(tmp_path):
    files = sing_data_set(tmp_path, sizes={"train": 16, "eval": 2, "held_out": 15}, seed=3)
    rows = {part: json.loads(file.read_text()) for part, file in files.items()}
    assert {part: len(each) for part, each in rows.items()} == {
        "sounds_train": 16,
        "sounds_eval": 2,
        "held_out": 30,
    }
    for row in rows["sounds_train"]:
        clip = open_audio(row["audio"], tmp_path)
        assert 0.4 < clip.seconds < 0.8
        assert 0.15 < np.abs(clip.decode()).max() < 0.95
    asked = Counter(row["conversations"][0]["content"] for row in rows["held_out"])
    assert asked == {f"<audio>\n{question}": 15 for question in QUESTIONS.values()}
    expected = {QUESTIONS["vowel"]: 1 / len(VOWELS), QUESTIONS["way"]: 1 / len(WAYS)}
    assert chance(rows["held_out"]) == pytest.approx(expected)
    turns = [turn["content"] for row in rows["sounds_train"] for turn in row["conversations"]]
    assert len(turns) == 16 * 3
    answers = set(turns[1::2])
    assert answers == {*VOWELS, *WAYS}
    assert answers < set(sentences())


def test_the_same_seed_sings_the_same_clips(tmp_path):
    sizes = {"train": 2, "eval": 1, "held_out": 1}
    clips = {}
    for name, seed in (("first", 5), ("second", 5), ("other", 6)):
        sing_data_set(tmp_path / name, sizes=sizes, seed=seed)
        clips[name] = [path.read_bytes() for path in sorted(Path(tmp_path, name, "clips").iterdir())]
    assert clips["first"] == clips["second"]
    assert not set(clips["first"]) & set(clips["other"])


def decibels(samples):
    return 10 * np.log10(np.mean(np.square(samples)))


@pytest.mark.parametrize(("way", "expected"), WAYS.items())
def test_loudness_changes_as_the_answer_says(way, expected):
    third = len(samples := sing(Song("ah", way), SINGER, seed=1)) // 3
    found = decibels(samples[-third:]) - decibels(samples[:third])
    assert found == pytest.approx(expected * 2 / 3, abs=3)  # between the middles of two thirds


def test_vowels_differ_where_their_formants_are():
    def share(vowel, low, high):
        spectrum = np.abs(np.fft.rfft(sing(Song(vowel, "even"), SINGER, seed=1))) ** 2
        frequencies = np.fft.rfftfreq(2 * len(spectrum) - 2, 1 / RATE)
        return spectrum[(frequencies > low) & (frequencies < high)].sum() / spectrum.sum()

    assert share("ah", 600, 900) > 3 * share("oo", 600, 900)
    assert share("ee", 2000, 3200) > 3 * share("oo", 2000, 3200)
    assert share("oo", 200, 400) > 3 * share("ah", 200, 400)

"""Sings a data set of vowels: real .wav files, and rows about what is sung and how its loudness changes.

    python sing_vowels.py FOLDER [--train 960] [--eval 30] [--held_out 90] [--seed 0]

Every clip is one vowel of a singer who does not exist: harmonics of a pitch, shaped by the resonances of a vocal
tract. The singer's pitch and its glide, size, breath, loudness, and the length of the clip distract. Singers of the
training rows and of all others differ: their pitches come from bands that alternate over the voice's range, and so do
their sizes, so a model that learned single voices by heart fails.

Two questions are asked about a clip. Half of the rows to train on ask one of them, the others both, in either order;
``held_out.json`` has a row for each clip and question. All pairs of vowel and way come equally often, so neither the
question nor an earlier answer tells the next one.
"""

from __future__ import annotations

import argparse
import json
import random
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

RATE = 16_000  # samples per second

# The first four resonances (formants) of a grown man's vocal tract in hertz; the first two follow Peterson and Barney
# (1952), spread a little.
VOWELS: dict[str, tuple[int, int, int, int]] = {
    "ah": (750, 1150, 2450, 3500),
    "eh": (530, 1840, 2500, 3500),
    "ee": (280, 2300, 3000, 3700),
    "oh": (480, 850, 2400, 3400),
    "oo": (310, 720, 2250, 3300),
}
WAYS = {"louder": 24, "softer": -24, "even": 0}  # decibels from begin to end
QUESTIONS = {"vowel": "Which vowel is sung?", "way": "How does the loudness change?"}
_ORDERS = [["vowel"], ["vowel", "way"], ["way"], ["way", "vowel"]]
PARTS = {"train": 960, "eval": 30, "held_out": 90}
_PITCH = (95.0, 210.0)  # hertz in the middle of a clip
_GLIDE = 4.0  # semitones
_SIZE = (0.92, 1.12)  # what a singer's size multiplies the formants by
_SECONDS = (0.45, 0.7)
_BANDS = 10  # of pitch and of size, alternately of training and other singers
_BANDWIDTHS = (80, 100, 140, 200)  # of the formants, in hertz
_FADE = 0.03  # seconds at both ends


@dataclass(frozen=True)
class Song:
    """What a clip holds.

    Attributes:
        vowel: A key of ``VOWELS``.
        way: A key of ``WAYS``.
    """

    vowel: str
    way: str


@dataclass(frozen=True)
class Singer:
    """Who sings it.

    Attributes:
        pitch: In the middle of the clip, in hertz.
        glide: How far the pitch moves from begin to end, in semitones.
        size: What the formants are multiplied by.
        breath: Loudness of the noise, as a share of the voice's.
        loudness: Of the loudest sample, from 0 to 1.
        seconds: Length of the clip.
    """

    pitch: float
    glide: float
    size: float
    breath: float
    loudness: float
    seconds: float


def sing_data_set(folder: Path, *, sizes: dict[str, int], seed: int) -> dict[str, Path]:
    """Sing all clips and write the three files of rows.

    Args:
        folder: Where to; clips go into ``clips``, rows beside it.
        sizes: Number of clips for each of ``PARTS``.
        seed: The same seed sings the same clips.

    Returns:
        ``sounds_train``, ``sounds_eval`` and ``held_out`` -> file of rows.
    """
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    files = {}
    for part in PARTS:
        rows = []
        for index, song in enumerate(_balanced_songs(sizes[part], rng)):
            name = f"{part}_{index:05d}"
            singer = choose_singer(rng, heard=part == "train")
            write_wave(folder / "clips" / f"{name}.wav", sing(song, singer, seed=rng.getrandbits(32)))
            asked = [[kind] for kind in QUESTIONS] if part == "held_out" else [_ORDERS[index % len(_ORDERS)]]
            rows += [
                {"id": name, "audio": f"clips/{name}.wav", "conversations": ask(kinds, song)}
                for kinds in asked
            ]
        title = part if part == "held_out" else f"sounds_{part}"
        files[title] = folder / f"{title}.json"
        files[title].write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return files


def ask(kinds: Sequence[str], song: Song) -> list[dict[str, str]]:
    """The conversation about a clip; ``kinds`` are keys of ``QUESTIONS``."""
    turns = []
    for number, kind in enumerate(kinds):
        content = QUESTIONS[kind] if number else f"<audio>\n{QUESTIONS[kind]}"
        turns += [{"role": "user", "content": content}, {"role": "assistant", "content": getattr(song, kind)}]
    return turns


def sentences() -> Iterator[str]:
    """Every question and answer there is; what a small tokenizer should have whole words for."""
    for vowel, way, kinds in product(VOWELS, WAYS, _ORDERS):
        yield from (turn["content"] for turn in ask(kinds, Song(vowel, way)))


def choose_singer(rng: random.Random, *, heard: bool) -> Singer:
    """A singer for the training rows (``heard``), or one that these rows never have.

    Example:
        >>> rng = random.Random(0)
        >>> heard = {_band(choose_singer(rng, heard=True).pitch, _PITCH) % 2 for _ in range(100)}
        >>> unheard = {_band(choose_singer(rng, heard=False).pitch, _PITCH) % 2 for _ in range(100)}
        >>> heard, unheard
        ({0}, {1})
    """
    return Singer(
        pitch=_from_band(rng, _PITCH, heard=heard),
        glide=rng.uniform(-_GLIDE, _GLIDE),
        size=_from_band(rng, _SIZE, heard=heard),
        breath=rng.uniform(0.01, 0.06),
        loudness=rng.uniform(0.2, 0.9),
        seconds=rng.uniform(*_SECONDS),
    )


def sing(song: Song, singer: Singer, *, seed: int) -> np.ndarray:
    """Sing a clip.

    The voice is a sum of the pitch's harmonics, each weaker by its number as those of the glottis are, and as loud as
    the formants let it through: two-pole resonances in a row, as in a cascade synthesizer (Klatt, 1980).

    Returns:
        [samples] float32 in [-1, 1], at ``RATE``.
    """
    noise = np.random.default_rng(seed)
    count = int(singer.seconds * RATE)
    way = np.linspace(-0.5, 0.5, count)
    pitch = singer.pitch * 2 ** (singer.glide / 12 * way)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    formants = [formant * singer.size for formant in VOWELS[song.vowel]]
    voice = np.zeros(count)
    for harmonic in range(1, int(4000 / singer.pitch) + 1):
        loudness = _passed(harmonic * pitch, formants) / harmonic
        voice += loudness * np.sin(harmonic * phase + noise.uniform(0, 2 * np.pi))
    voice /= np.abs(voice).max()
    voice += singer.breath * noise.standard_normal(count)
    fade = np.minimum(np.arange(count), np.arange(count)[::-1]) / (_FADE * RATE)
    voice *= np.minimum(fade, 1) * 10 ** (WAYS[song.way] / 20 * way)
    return (singer.loudness * voice / np.abs(voice).max()).astype(np.float32)


def write_wave(path: Path, samples: np.ndarray) -> None:
    """Write a PCM16 file at 16 kHz with one channel."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((samples * 32767).astype("<i2").tobytes())


def _passed(frequencies: np.ndarray, formants: list[float]) -> np.ndarray:
    """How much of each frequency the vocal tract lets through."""
    passed = np.ones_like(frequencies)
    for formant, width in zip(formants, _BANDWIDTHS, strict=True):
        passed *= formant**2 / np.hypot(formant**2 - frequencies**2, width * frequencies)
    return passed


def _from_band(rng: random.Random, bounds: tuple[float, float], *, heard: bool) -> float:
    """A value from the even bands between two bounds, or from the odd ones."""
    low, high = bounds
    band = 2 * rng.randrange(_BANDS // 2) + (0 if heard else 1)
    return low + (high - low) * (band + rng.random()) / _BANDS


def _band(value: float, bounds: tuple[float, float]) -> int:
    low, high = bounds
    return int((value - low) / (high - low) * _BANDS)


def _balanced_songs(count: int, rng: random.Random) -> list[Song]:
    """Songs in which each pair of vowel and way comes equally often."""
    songs = [Song(*words) for words in product(VOWELS, WAYS)]
    rng.shuffle(songs)
    dealt = [songs[index % len(songs)] for index in range(count)]
    rng.shuffle(dealt)
    return dealt


def main() -> None:
    """Sing a data set, as the command line says."""
    parser = argparse.ArgumentParser(description="Sing a data set of vowels.")
    parser.add_argument("folder", type=Path)
    for part, count in PARTS.items():
        parser.add_argument(f"--{part}", type=int, default=count, help=f"clips (default: {count})")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sizes = {part: getattr(arguments, part) for part in PARTS}
    sing_data_set(arguments.folder, sizes=sizes, seed=arguments.seed)


if __name__ == "__main__":
    main()

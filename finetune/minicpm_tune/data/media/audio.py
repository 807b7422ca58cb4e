"""Audio of a row: decoded to one channel at 16 kHz, and its log-mel frames as Whisper's extractor makes them.

A PCM16 ``.wav`` file at 16 kHz is read with the standard library. Everything else (flac, mp3, m4a, the sound of a
video, other rates) is decoded by PyAV and resampled by soxr at the quality that ``librosa.load`` uses, which is what
the guides of MiniCPM-o tell people to call. Channels are averaged; the level is left as it is.

Source: released processing_minicpmo.py of MiniCPM-o 2.6 and 4.5 (frames, cuts, counts), checked against its outputs
by ``tests/data/test_audio.py``.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from minicpm_tune.data.media.sources import check_source, describe, open_bytes
from minicpm_tune.errors import RowError

RATE = 16_000  # samples per second, what the encoder was trained on
HOP = 160  # samples of a mel frame: 10 ms
MEL_BINS = 80
# The extractor takes 30 s at once; longer audio is cut there, and the rest, however short, is a segment of its own.
LONGEST_SEGMENT = 30 * RATE
ENCODER_FRAMES_PER_SECOND = 50


@dataclass(frozen=True)
class AudioRules:
    """How a generation turns audio into tokens.

    Attributes:
        pool: Encoder frames that become one audio token.
        per_second: Whether every second has a placeholder of its own (o-2.6), or a whole audio has one (o-4.5).
    """

    pool: int
    per_second: bool

    def tokens(self, samples: int) -> int:
        """Audio tokens of so many samples; 0 when they are too few for one.

        Example:
            >>> AudioRules(pool=2, per_second=True).tokens(16_000)
            25
        """
        return self.tokens_of_frames(mel_frames(samples))

    def tokens_of_frames(self, frames: int) -> int:
        """The same, of so many log-mel frames."""
        return -(-frames // 2) // self.pool

    def runs(self, samples: int) -> list[int]:
        """Tokens of each placeholder of one audio.

        Example:
            >>> AudioRules(pool=2, per_second=True).runs(37_280)
            [25, 25, 8]
        """
        total = self.tokens(samples)
        if not self.per_second:
            return [total] if total else []
        step = ENCODER_FRAMES_PER_SECOND // self.pool
        return [min(step, total - start) for start in range(0, total, step)]

    @property
    def fewest_samples(self) -> int:
        """Samples of the shortest audio that has a token."""
        return (2 * self.pool - 2) * HOP + 1


@dataclass(frozen=True)
class Clip:
    """One audio of a row; it is decoded when its waveform is asked for.

    Attributes:
        name: The source in a few words, for messages.
        samples: Its length, in samples of 16 kHz.
        decode: Gives [samples] float32 in [-1, 1], one channel at 16 kHz.
        kind: ``audio``, as ``Media.kind``.
    """

    name: str
    samples: int
    decode: Callable[[], np.ndarray] = field(repr=False)
    kind: str = "audio"

    @classmethod
    def of(cls, waveform: np.ndarray, name: str = "(samples)") -> Clip:
        """A clip that is decoded already."""
        return cls(name, len(waveform), lambda: waveform)

    @property
    def seconds(self) -> float:
        return self.samples / RATE

    @property
    def sizes(self) -> tuple[()]:
        """None: there is nothing to see."""
        return ()

    def frames(self) -> list[Any]:
        """None; decodes the audio, so that whoever looks for damage finds it."""
        self.decode()
        return []


def mel_frames(samples: int) -> int:
    """Log-mel frames of a waveform of so many samples."""
    return -(-samples // HOP)


def open_audio(value: Any, folder: Path, *, allow_remote: bool = False) -> Clip:
    """Read and decode one audio of a row.

    Args:
        value: A path, data URI, bytes, {bytes, path}, or {array, sampling_rate} as Hugging Face data sets give it.
        folder: What relative paths are relative to.
        allow_remote: Whether http(s) addresses are fetched.

    Returns:
        The clip.

    Raises:
        RowError: When it is not there, can't be decoded, or holds no sound; the message names it.
    """
    if isinstance(value, Mapping) and value.get("array") is not None:
        name = f"of {len(np.atleast_1d(value['array']))} samples"
        return Clip.of(_checked(_from_array(value, name), name), name)
    check_source(value, folder, allow_remote=allow_remote)
    name = describe(value)
    data = open_bytes(value, folder, name)
    samples = _plain_samples(data)
    if samples:  # the header says how long it is
        return Clip(name, samples, lambda: _checked(_plain_wave(data, name), name))
    return Clip.of(_checked(decode_sound(data, name), name), name)


def log_mel(waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Log-mel features of waveforms, each cut every 30 s.

    Returns:
        Of every segment, in order, [80, frames] float32.
    """
    found = []
    for waveform in waveforms:
        for start in range(0, len(waveform), LONGEST_SEGMENT):
            segment = waveform[start : start + LONGEST_SEGMENT]
            # Padded to 30 s with zeros before the transform, as released: the last frames look into them.
            features = _extractor()(segment, sampling_rate=RATE, return_tensors="np").input_features[0]
            found.append(features[:, : mel_frames(len(segment))])
    return found


def merged(clips: Sequence[Clip], messages: Sequence[int]) -> list[np.ndarray]:
    """Join the audios of each message to one waveform, as the released ``chat`` does.

    Args:
        clips: The audios of a conversation, in their order.
        messages: The message each stands in.
    """
    joined: dict[int, list[np.ndarray]] = {}
    for clip, message in zip(clips, messages, strict=True):
        joined.setdefault(message, []).append(clip.decode())
    return [np.concatenate(parts) for parts in joined.values()]


@cache
def _extractor() -> Any:
    from transformers import WhisperFeatureExtractor  # takes a second, and only audio needs it

    return WhisperFeatureExtractor()


def _plain_samples(data: io.BytesIO | Path) -> int | None:
    """Samples of a PCM16 file at 16 kHz by its header; None for anything else."""
    try:
        with wave.open(_readable(data)) as file:
            plain = file.getsampwidth() == 2 and file.getframerate() == RATE
            return file.getnframes() if plain else None
    except (wave.Error, EOFError, ValueError, OSError):
        return None


def _plain_wave(data: io.BytesIO | Path, name: str) -> np.ndarray:
    with wave.open(_readable(data)) as file:
        channels, expected = file.getnchannels(), file.getnframes()
        samples = np.frombuffer(file.readframes(expected), dtype="<i2")
    if len(samples) != expected * channels:
        raise _error(
            name,
            f"holds {len(samples) // channels} samples, expected {expected} as its header says. The file is cut off: "
            "replace it.",
        )
    return (samples.reshape(-1, channels).astype(np.float32) / 32768).mean(axis=1)


def _readable(data: io.BytesIO | Path) -> Any:
    if isinstance(data, Path):
        return str(data)
    return io.BytesIO(data.getvalue())  # reading moves it, and it may be read twice


def decode_sound(data: io.BytesIO | Path, name: str) -> np.ndarray:
    """Decode any sound file, or the sound of a video, through PyAV."""
    try:
        import av
    except ModuleNotFoundError as error:
        raise _error(
            name,
            "is not a 16 kHz PCM16 .wav file, and other forms need a decoder that is not installed. Install it: pip "
            "install av soxr",
        ) from error
    try:
        with av.open(_readable(data), mode="r") as container:
            if not container.streams.audio:
                raise _error(name, "holds no sound, expected a stream of audio. Replace it.")
            stream = container.streams.audio[0]
            to_float = av.AudioResampler(format="fltp")
            blocks, rate = [], stream.rate
            for frame in container.decode(stream):
                blocks += [block.to_ndarray() for block in to_float.resample(frame)]
    except (av.FFmpegError, OSError, ValueError) as error:
        raise _error(name, f"can't be decoded ({error}), expected a whole audio file. Replace it.") from error
    if not blocks:
        raise _error(name, "has 0 samples, expected some sound. Replace it, or remove the row.")
    return _resampled(np.concatenate(blocks, axis=1).mean(axis=0, dtype=np.float32), rate, name)


def _from_array(value: Mapping[str, Any], name: str) -> np.ndarray:
    rate = value.get("sampling_rate")
    samples = np.asarray(value["array"])
    if not isinstance(rate, (int, np.integer)) or rate <= 0 or samples.ndim > 2:
        raise _error(
            name,
            f"has sampling_rate {rate!r} and {samples.ndim} dimensions, expected a number of samples per second and an "
            "array [samples] or [channels, samples]. Fix the row.",
        )
    if np.issubdtype(samples.dtype, np.integer):
        samples = samples / -float(np.iinfo(samples.dtype).min)
    samples = samples.astype(np.float32)
    return _resampled(samples if samples.ndim == 1 else samples.mean(axis=0), int(rate), name)


def _resampled(waveform: np.ndarray, rate: int, name: str) -> np.ndarray:
    if rate == RATE:
        return waveform
    try:
        import soxr
    except ModuleNotFoundError as error:
        raise _error(
            name,
            f"has {rate} samples per second, and rates other than {RATE} need a resampler that is not installed. "
            "Install it: pip install soxr",
        ) from error
    return soxr.resample(waveform, rate, RATE, quality="HQ").astype(np.float32)


def _checked(waveform: np.ndarray, name: str) -> np.ndarray:
    if not len(waveform):
        raise _error(name, "has 0 samples, expected some sound. Replace it, or remove the row.")
    if not np.isfinite(waveform).all():
        raise _error(name, "holds values that are no numbers, expected samples. Replace it.")
    return waveform


def _error(name: str, problem: str) -> RowError:
    return RowError("audio", f"audio {name} {problem}")

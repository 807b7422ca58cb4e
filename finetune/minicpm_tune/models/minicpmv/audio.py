"""How MiniCPM-o hears: the encoder half of Whisper, a projection, and the mean of neighbors.

A waveform reaches the model as log-mel frames of 10 ms. Two convolutions halve them (20 ms), the encoder's
blocks run on the result, and the projection's output is averaged over ``pool`` neighbors: one audio token each.
All segments of a batch go through the encoder together, side by side in one row; nothing is padded to the longest.

The released code pads the segments of a call to the longest one and compares positions after the convolutions
with lengths before them, so a segment attends to some of its own padding: its features depend on the longest
segment of the call. ``Segment.longest`` carries that length. It is the longest of the segment's own conversation,
as inference on one conversation has it, so batching and packing don't change a sample's features.

Source: released modeling_minicpmo.py of MiniCPM-o 2.6 and 4.5; checked against its outputs by
``tests/goldens/test_audio_goldens.py``. Letters: F mel frames of all segments, A segments, N encoder frames of all
segments, W width of the encoder, D width of the LLM, K audio tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from minicpm_tune.models.batch_layout import first_of_each, spans

MEL_BINS = 80
ENCODER_FRAMES_PER_SECOND = 50
# The audio that stands in when a batch has none: one second, as in the released training forward.
DUMMY_FRAMES = 100


@dataclass(frozen=True)
class Segment:
    """A waveform of at most 30 s that the encoder sees at once.

    Attributes:
        frames: Its mel frames.
        longest: Mel frames of the longest segment of its conversation.
    """

    frames: int
    longest: int

    @property
    def encoded(self) -> int:
        """Encoder frames of the segment itself."""
        return (self.frames - 1) // 2 + 1

    def attended(self, block: int) -> int:
        """Encoder frames that take part in attention, padding that the released code attends to included.

        Args:
            block: Encoder frames of one block of the block-causal mask; 0 for full attention.
        """
        whole = (self.longest - 1) // 2 + 1
        if not block:
            return min(whole, self.frames)
        return min(whole, block * -(-self.encoded // block), self.frames)

    def tokens(self, pool: int) -> int:
        """Audio tokens of the segment; 0 when it is too short for one."""
        return self.encoded // pool


@dataclass(frozen=True)
class AudioInput:
    """The audio of a batch.

    Attributes:
        mel: [80, F] float32, the log-mel frames of all segments side by side.
        segments: [A], sample after sample.
        kept: [A] audio tokens of each segment that have a place; the rest at its end is dropped.
        bounds: [P] (row, start, end) of the runs of placeholder tokens.
    """

    mel: Tensor
    segments: list[Segment]
    kept: list[int]
    bounds: Sequence[Sequence[int]]

    @classmethod
    def taken_from(cls, keys: dict[str, Any]) -> AudioInput | None:
        """Take the audio out of the keys of a ``batch.Batch``; None when it has none."""
        values, segments, bounds = (
            keys.pop(name, None) for name in ("audio_values", "audio_segments", "audio_bound")
        )
        if values is None or segments is None or not len(segments):
            return None
        rows = segments.tolist()
        heard = [Segment(frames, longest) for frames, longest, _ in rows]
        return cls(values, heard, [kept for *_, kept in rows], bounds.tolist())

    @classmethod
    def dummy(cls, device: torch.device) -> AudioInput:
        """One second of silence that has no place, for a batch without audio."""
        mel = torch.zeros(MEL_BINS, DUMMY_FRAMES, device=device)
        return cls(mel, [Segment(DUMMY_FRAMES, DUMMY_FRAMES)], [0], [])

    def placed(self, tokens: Tensor, pool: int) -> Tensor:
        """[K, D] tokens of all segments -> those that have a place.

        Raises:
            ValueError: When their number is not that of the places.
        """
        count = sum(end - start for _, start, end in self.bounds)
        if sum(self.kept) != count:
            raise ValueError(
                f"The batch has {sum(self.kept)} audio tokens (audio_segments) and {count} places for them "
                "(audio_bound), expected as many of one as of the other."
            )
        if count == tokens.shape[0]:
            return tokens
        lengths = [segment.tokens(pool) for segment in self.segments]
        return tokens[first_of_each(lengths, self.kept).to(tokens.device)]

    def places(self, width: int) -> Tensor:
        """[K] places of the audio tokens in the flattened [B * T] batch; ``width`` is T."""
        starts = [row * width + start for row, start, _ in self.bounds]
        return spans(starts, [end - start for _, start, end in self.bounds])


class _Attention(nn.Module):
    """Whisper's self-attention (key names as released; the keys have no bias)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor, groups: list[_Group]) -> Tensor:
        """[N, W] -> [N, W], attention within the segments."""
        q, k, v = (
            project(hidden).unflatten(-1, (self.heads, -1))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = torch.empty_like(q)
        for group in groups:
            # [segments, heads, length, head]
            query, key, value = (part[group.rows].transpose(1, 2) for part in (q, k, v))
            found = F.scaled_dot_product_attention(query, key, value, attn_mask=group.mask)
            mixed = mixed.index_copy(0, group.rows.flatten(), found.transpose(1, 2).flatten(0, 1))
        return self.out_proj(mixed.flatten(1))


@dataclass(frozen=True)
class _Group:
    """Segments of one length, which attention takes together.

    Attributes:
        rows: [segments, length] int64, their places in the row of all encoder frames.
        mask: [length, length] bool, True where a frame is seen; None when every frame sees all.
    """

    rows: Tensor
    mask: Tensor | None

    @classmethod
    def all_of(cls, lengths: Sequence[int], block: int, device: torch.device) -> list[_Group]:
        starts = accumulate(lengths, initial=0)
        firsts: dict[int, list[int]] = {}
        for start, length in zip(starts, lengths, strict=False):
            firsts.setdefault(length, []).append(start)
        groups = []
        for length, first in firsts.items():
            rows = torch.tensor(first)[:, None] + torch.arange(length)
            mask = None
            if block and length > block:
                blocks = torch.arange(length) // block
                mask = (blocks[None, :] <= blocks[:, None]).to(device, non_blocking=True)
            groups.append(cls(rows.to(device, non_blocking=True), mask))
        return groups


class AudioEncoderLayer(GradientCheckpointingLayer):
    """A pre-norm block of Whisper's encoder (key names as released)."""

    def __init__(self, width: int, heads: int, ffn_width: int):
        super().__init__()
        self.self_attn = _Attention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, ffn_width)
        self.fc2 = nn.Linear(ffn_width, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, hidden: Tensor, groups: list[_Group]) -> Tensor:
        """[N, W] -> [N, W]."""
        hidden = hidden + self.self_attn(self.self_attn_layer_norm(hidden), groups)
        return hidden + self.fc2(F.gelu(self.fc1(self.final_layer_norm(hidden))))


class AudioEncoder(nn.Module):
    """``apm`` of the released checkpoints: the encoder half of Whisper.

    Args:
        config: ``audio_config`` of config.json.
        chunk_seconds: ``audio_chunk_length``: a frame sees its own block of so many seconds and the blocks before
            it; 0 or less: everything.
    """

    def __init__(self, config: dict[str, Any], *, chunk_seconds: float):
        super().__init__()
        width = config["d_model"]
        self.block = max(int(chunk_seconds * ENCODER_FRAMES_PER_SECOND), 0)
        self.conv1 = nn.Conv1d(config.get("num_mel_bins", MEL_BINS), width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.get("max_source_positions", 1500), width)
        self.embed_positions.requires_grad_(False)  # as in the released class
        self.layers = nn.ModuleList(
            AudioEncoderLayer(width, config["encoder_attention_heads"], config["encoder_ffn_dim"])
            for _ in range(config["encoder_layers"])
        )
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, mel: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Encode the segments.

        Args:
            mel: [80, F] float32, the segments' log-mel frames side by side.
            segments: [A], known on the CPU, so that nothing is read back from the device.

        Returns:
            [N, W], the encoder frames of the segments themselves, side by side.
        """
        attended = [segment.attended(self.block) for segment in segments]
        hidden = self._convolved(mel, segments, attended)
        groups = _Group.all_of(attended, self.block, hidden.device)
        for layer in self.layers:
            hidden = layer(hidden, groups)
        own = first_of_each(attended, [segment.encoded for segment in segments])
        return self.layer_norm(hidden[own.to(hidden.device, non_blocking=True)])

    def _convolved(self, mel: Tensor, segments: Sequence[Segment], attended: list[int]) -> Tensor:
        """[80, F] -> [sum of attended frames, W], positions added; all segments have slots in one row of frames."""
        device = mel.device
        slots = [
            min(segment.longest, 2 * count + 1) for segment, count in zip(segments, attended, strict=True)
        ]
        # At least one zero frame behind each slot, and an even start for the convolution of stride 2.
        *starts, length = accumulate((slot + 2 - slot % 2 for slot in slots), initial=0)
        # Kept frames of the input; a slot is longer than its segment where padding is attended to.
        source = [min(segment.frames, slot) for segment, slot in zip(segments, slots, strict=True)]
        places = spans(starts, source).to(device, non_blocking=True)
        given = first_of_each([segment.frames for segment in segments], source).to(device, non_blocking=True)
        inside = torch.zeros(length, dtype=torch.bool)
        inside[spans(starts, slots)] = True
        inside = inside.to(device, non_blocking=True)
        frames = mel.new_zeros(mel.shape[0], length).index_copy(1, places, mel[:, given])
        # Outside the slots the second convolution must see zeros, as it does beyond the ends of a segment.
        hidden = F.gelu(self.conv1(frames[None].to(self.conv1.weight.dtype))) * inside
        hidden = F.gelu(self.conv2(hidden))[0].T
        places = spans([start // 2 for start in starts], attended).to(device, non_blocking=True)
        positions = spans([0] * len(attended), attended).to(device, non_blocking=True)
        return hidden[places] + self.embed_positions(positions)


class AudioProjection(nn.Module):
    """``audio_projection_layer``: from the encoder's width to the LLM's (key names as released)."""

    def __init__(self, width: int, llm_width: int):
        super().__init__()
        self.linear1 = nn.Linear(width, llm_width)
        self.linear2 = nn.Linear(llm_width, llm_width)

    def forward(self, features: Tensor) -> Tensor:
        """[N, W / 4 of the feed-forward width] -> [N, D]."""
        return self.linear2(F.relu(self.linear1(features)))


def pooled(features: Tensor, segments: Sequence[Segment], pool: int) -> Tensor:
    """Average over ``pool`` neighbors; a rest of fewer is dropped.

    Args:
        features: [N, D] projected features, segment after segment.
        segments: [A].
        pool: ``audio_pool_step`` of config.json.

    Returns:
        [K, D], the audio tokens of all segments in their order.
    """
    lengths = [segment.encoded for segment in segments]
    used = [segment.tokens(pool) * pool for segment in segments]
    index = first_of_each(lengths, used).to(features.device, non_blocking=True)
    return features[index].unflatten(0, (-1, pool)).mean(dim=1)

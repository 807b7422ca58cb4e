"""The gated delta-net layer of Qwen3.5 for training: samples of a packed row stay apart.

A recurrent layer has no mask: its convolution and its state run on from one sample of a row into the next.
transformers 5.23 isolates packed samples in it only where both flash-linear-attention and causal-conv1d are
installed, and refuses elsewhere. Here ``SpreadLayout`` does, and needs neither; where flash-linear-attention is at
hand on a GPU, its kernel computes the delta rule.
Letters: B rows, T tokens, N real tokens, W tokens of a spread row, H value heads.
"""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet
from transformers.utils.generic import maybe_autocast

from minicpm_tune.models.batch_layout import SampleLayout, placed, spans

# The chunk length of the chunked delta rule (transformers' default): samples start at multiples of it.
CHUNK = 64
# Log decay at a reset: exp(-10000) is exactly 0 in fp32, so nothing of the old state is left. It stands
# only on the last token of a chunk, where no later cumulative sum loses digits by its size.
RESET = -10_000.0

_HAS_KERNEL = importlib.util.find_spec("fla") is not None
_kernel_rule = modeling_qwen3_5.torch_chunk_gated_delta_rule
_torch_rule = inspect.unwrap(_kernel_rule)


@dataclass(frozen=True)
class SpreadLayout(SampleLayout):
    """The samples of a batch, and a spread form of it in which nothing can leak between them.

    In the spread form every sample starts at a multiple of ``CHUNK``, behind at least ``gap`` empty
    tokens; the last token of the gap is where a recurrent state is reset. A row that holds a single
    sample is not spread at all.

    Attributes:
        gap: Fewest empty tokens between two samples; the kernel size of the convolution.
    """

    gap: int

    @cached_property
    def _spread_starts(self) -> tuple[list[list[int]], int]:
        """Where samples start in each spread row, and W."""
        rows, spread_width = [], 0
        for lengths in self.lengths:
            starts: list[int] = []
            end = 0
            for length in lengths:
                start = 0 if not starts else -(-(end + self.gap) // CHUNK) * CHUNK
                starts.append(start)
                end = start + length
            rows.append(starts)
            spread_width = max(spread_width, end)
        return rows, spread_width

    @property
    def spread_width(self) -> int:
        """W, the length of a spread row."""
        return self._spread_starts[1]

    @cached_property
    def slots(self) -> Tensor:
        """[N] place of each real token in the flattened [B * W] spread form."""
        rows, spread_width = self._spread_starts
        starts = [row * spread_width + start for row, starts in enumerate(rows) for start in starts]
        return spans(starts, self.samples).to(self.device, non_blocking=True)

    @cached_property
    def resets(self) -> Tensor:
        """Places in the flattened [B * W] spread form in front of each sample but a row's first."""
        rows, spread_width = self._spread_starts
        places = [row * spread_width + start - 1 for row, starts in enumerate(rows) for start in starts[1:]]
        return torch.tensor(places, dtype=torch.int64).to(self.device, non_blocking=True)

    def spread(self, tokens: Tensor) -> Tensor:
        """[N, ...] -> [B, W, ...], zero between the samples."""
        return placed(tokens, self.slots, len(self.lengths), self.spread_width)

    def collect(self, spread: Tensor) -> Tensor:
        """[B, W, ...] -> [N, ...], what stands between the samples dropped."""
        flat = spread.flatten(0, 1)
        return flat if flat.shape[0] == self.slots.shape[0] else flat[self.slots]


class _PackedForward(nn.Module):
    """A second forward for transformers' layer, used when it is told the samples of the batch.

    The second forward calls every submodule once, whatever the batch holds: under ZeRO-3 each such
    call is a collective, and ranks have different batches. It ignores padding and sample
    boundaries only in the two steps that mix tokens, the convolution and the delta rule.

    Attributes:
        delta_kernel: What computes the delta rule on a GPU, for the log.
    """

    delta_kernel = (
        "flash-linear-attention" if _HAS_KERNEL else "torch (pip install flash-linear-attention is faster)"
    )

    # Made by transformers' layer.
    in_proj_qkv: nn.Linear
    in_proj_a: nn.Linear
    in_proj_b: nn.Linear
    in_proj_z: nn.Linear
    out_proj: nn.Linear
    conv1d: nn.Conv1d
    norm: Any
    A_log: nn.Parameter
    dt_bias: nn.Parameter
    activation: str
    key_dim: int
    value_dim: int
    head_k_dim: int
    head_v_dim: int

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        samples: SpreadLayout | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D].

        Args:
            hidden_states: [B, T, D]; with ``samples`` [1, N, D], the real tokens alone.
            cache_params: Generation's cache; without ``samples`` only.
            attention_mask: [B, T], or None; without ``samples`` only.
            samples: The samples of the batch; None runs transformers' own forward.
            **kwargs: For transformers' own forward.

        Returns:
            In the form of ``hidden_states``.
        """
        if samples is None:
            return super().forward(
                hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs
            )
        assert cache_params is None, "training has no cache"
        tokens = hidden_states[0]
        mixed = samples.spread(self.in_proj_qkv(tokens))
        # The convolution pads on both sides; its first W outputs are the causal ones.
        mixed = self.conv1d(mixed.transpose(1, 2))[..., : samples.spread_width].transpose(1, 2)
        mixed = ACT2FN[self.activation](mixed)
        strength = self.in_proj_b(tokens).sigmoid()
        decay = -self.A_log.float().exp() * F.softplus(self.in_proj_a(tokens).float() + self.dt_bias)
        recalled = self._delta_rule(mixed, decay, strength, samples).reshape(-1, self.head_v_dim)
        gate = self.in_proj_z(tokens).reshape(-1, self.head_v_dim)
        gated = self.norm(recalled, gate).reshape(tokens.shape[0], -1)
        return self.out_proj(gated)[None]

    def _delta_rule(self, mixed: Tensor, decay: Tensor, strength: Tensor, samples: SpreadLayout) -> Tensor:
        """[B, W, channels] after the convolution, [N, H] decay and strength -> [N, H, head_v_dim]."""
        if _kernel_at_hand(mixed):
            query, key, value = self._heads(samples.collect(mixed)[None])
            found, _ = _kernel_rule(
                query, key, value, g=decay[None], beta=strength[None],
                use_qk_l2norm_in_kernel=True, cu_seqlens=samples.ends,
            )  # fmt: skip
            return found[0]
        query, key, value = self._heads(mixed)
        log_decay = samples.spread(decay)
        if samples.resets.numel():
            resets = torch.full(
                (samples.resets.shape[0], decay.shape[1]), RESET, dtype=decay.dtype, device=decay.device
            )
            log_decay = log_decay.flatten(0, 1).index_copy(0, samples.resets, resets).view_as(log_decay)
        # Autocast would round the products that solve for the state to 16 bit; the kernels keep fp32.
        with maybe_autocast(mixed.device.type, enabled=False):
            # Between samples the strength is 0: empty tokens write nothing into the state.
            found, _ = _torch_rule(
                query, key, value, g=log_decay, beta=samples.spread(strength), use_qk_l2norm_in_kernel=True
            )
        return samples.collect(found)

    def _heads(self, mixed: Tensor) -> list[Tensor]:
        """[..., channels] -> query, key and value of [..., heads, head width]."""
        parts = mixed.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        widths = (self.head_k_dim, self.head_k_dim, self.head_v_dim)
        return [part.unflatten(-1, (-1, width)) for part, width in zip(parts, widths, strict=True)]


class PackedDeltaNet(_PackedForward, Qwen3_5GatedDeltaNet):
    """The layer of a dense model."""


class PackedMoeDeltaNet(_PackedForward, Qwen3_5MoeGatedDeltaNet):
    """The layer of a mixture of experts: the same under another name."""


_PACKED: dict[type[nn.Module], type[nn.Module]] = {
    Qwen3_5GatedDeltaNet: PackedDeltaNet,
    Qwen3_5MoeGatedDeltaNet: PackedMoeDeltaNet,
}


def _kernel_at_hand(states: Tensor) -> bool:
    return _HAS_KERNEL and states.is_cuda


def use_packed_delta_nets(language_model: Any) -> None:
    """Give every delta-net layer of an LLM the forward that knows samples, keeping its parameters.

    Classes are changed in place: the parameters stay the same objects, so that loading, tying and
    ZeRO-3's partitioning never see a difference.
    """
    for layer in language_model.layers:
        if hasattr(layer, "linear_attn"):
            # Of another kind packed samples would run into each other, without an error.
            layer.linear_attn.__class__ = _PACKED[type(layer.linear_attn)]

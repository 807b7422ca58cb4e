"""InternLM2 with partial LoRA: the language model of InternLM-XComposer2.

Partial LoRA (PLoRA) is a part of the model, not an adapter: beside every projection two narrow matrices
``Plora_A`` and ``Plora_B`` add to its output, at image tokens only. ``wqkv`` is one projection, as in the
released checkpoints, so that adapters have the released names; its rows are, for each key/value head, first
the query heads that share it, then the key, then the value.

Letters: B rows, T tokens, D width, M image tokens, G query heads per key/value head, E head width.
Source: the released modeling_internlm2.py and build_mlp.py of internlm-xcomposer2-7b and -vl-7b.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

PARTIAL = ("Plora_A", "Plora_B")


@dataclass(frozen=True)
class ImageTokens:
    """Where the image tokens of a batch are.

    Attributes:
        places: [M] places in the flattened [B * T] batch; in a batch without images one place of no meaning.
        real: False when the batch has no image. PLoRA then runs on that one place times zero: under ZeRO-3
            every call is a collective that all ranks must make, and its weights need a gradient.
    """

    places: Tensor
    real: bool = True


def new_projection(inputs: int, outputs: int, rank: int) -> nn.Linear:
    """Make a projection with its partial LoRA.

    It is a plain ``nn.Linear`` that carries two more as children, and ``project`` computes with all three. So
    whatever looks for linear layers (PEFT, bitsandbytes) treats it as one.
    """
    linear = nn.Linear(inputs, outputs, bias=False)
    linear.add_module(PARTIAL[0], nn.Linear(inputs, rank, bias=False))
    linear.add_module(PARTIAL[1], nn.Linear(rank, outputs, bias=False))
    return linear


def keep_partial(old: nn.Module, new: nn.Module) -> None:
    """Hand the partial LoRA of a projection on to the layer that takes its place (when it is quantized)."""
    for name in PARTIAL:
        if hasattr(old, name):
            new.add_module(name, getattr(old, name))


def project(linear: nn.Module, hidden: Tensor, image: ImageTokens | None, dropout: float) -> Tensor:
    """Apply a projection, with its partial LoRA at the image tokens.

    Args:
        linear: Made by ``new_projection``, possibly wrapped by an adapter or quantized.
        hidden: [B, T, inputs].
        image: The image tokens; None: there are none, and no other rank has any.
        dropout: Share of the partial LoRA's inputs that are zeroed, 0 outside training.

    Returns:
        [B, T, outputs].
    """
    out = linear(hidden)
    if image is None:
        return out
    partial: Any = getattr(linear, "base_layer", linear)
    part = hidden.flatten(0, 1)[image.places]
    if dropout:
        part = F.dropout(part, dropout)
    added = partial.Plora_B(partial.Plora_A(part)).to(out.dtype)
    if not image.real:
        added = added * 0
    return out.flatten(0, 1).index_add(0, image.places, added).view_as(out)


class InternLM2Attention(nn.Module):
    """Grouped-query attention with one fused projection."""

    rotate = staticmethod(apply_rotary_pos_emb)

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.partial_dropout = config, layer_idx, config.plora_dropout
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling, self.is_causal = self.head_dim**-0.5, True
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        self.wqkv = new_projection(config.hidden_size, heads * self.head_dim, config.plora_rank)
        self.wo = new_projection(
            config.num_attention_heads * self.head_dim, config.hidden_size, config.plora_rank
        )

    def forward(
        self,
        hidden: Tensor,
        *,
        mask: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        image: ImageTokens | None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]; see ``InternLM2Layer``."""
        dropout = self.partial_dropout * self.training
        fused = project(self.wqkv, hidden, image, dropout)
        fused = fused.unflatten(-1, (-1, self.num_key_value_groups + 2, self.head_dim))
        query = fused[..., :-2, :].flatten(2, 3).transpose(1, 2)
        key, value = fused[..., -2, :].transpose(1, 2), fused[..., -1, :].transpose(1, 2)
        query, key = self.rotate(query, key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        mixed, _ = attend(self, query, key, value, mask, dropout=0.0, scaling=self.scaling, **options)
        return project(self.wo, mixed.reshape(*hidden.shape[:-1], -1), image, dropout)


class InternLM2MLP(nn.Module):
    """w2(act(w1 x) * w3 x)."""

    def __init__(self, config: Any):
        super().__init__()
        self.partial_dropout = config.plora_dropout
        self.w1 = new_projection(config.hidden_size, config.intermediate_size, config.plora_rank)
        self.w3 = new_projection(config.hidden_size, config.intermediate_size, config.plora_rank)
        self.w2 = new_projection(config.intermediate_size, config.hidden_size, config.plora_rank)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor, image: ImageTokens | None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        dropout = self.partial_dropout * self.training
        gate, value = (project(linear, hidden, image, dropout) for linear in (self.w1, self.w3))
        return project(self.w2, self.gated(gate, value), image, dropout)

    def gated(self, gate: Tensor, value: Tensor) -> Tensor:
        """act(gate) * value."""
        return self.act(gate) * value


class InternLM2Layer(GradientCheckpointingLayer):
    """One block."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.attention = InternLM2Attention(config, layer_idx)
        self.feed_forward = InternLM2MLP(config)
        self.attention_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ffn_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: Tensor, *, image: ImageTokens | None, **options: Any) -> Tensor:
        """Run the block.

        Args:
            hidden: [B, T, D].
            image: The image tokens, for the partial LoRA.
            **options: For the attention: ``mask``, ``rotary``, ``past_key_values``, and what transformers'
                attention kernels take (``position_ids``).

        Returns:
            [B, T, D].
        """
        hidden = hidden + self.attention(self.attention_norm(hidden), image=image, **options)
        return hidden + self.feed_forward(self.ffn_norm(hidden), image)


class InternLM2Model(nn.Module):
    """Embeddings, blocks and the final norm.

    The released rotary embedding is "dynamic" with factor 1: up to ``max_position_embeddings`` (32768)
    positions it equals the plain one, which is what is computed here.

    Args:
        config: ``text_config`` of an ``XComposer2Config``.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            InternLM2Layer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)

    def use_liger(self) -> None:
        """Let liger's kernels compute norms, rotary embedding and SwiGLU, as ``speed_options.apply_liger``."""
        # Imported here: it imports triton, which only a GPU needs.
        from liger_kernel.transformers import liger_rotary_pos_emb
        from liger_kernel.transformers.functional import liger_swiglu
        from liger_kernel.transformers.monkey_patch import _patch_rms_norm_module

        _patch_rms_norm_module(self.norm)
        layers: Any = self.layers
        for layer in layers:
            _patch_rms_norm_module(layer.attention_norm)
            _patch_rms_norm_module(layer.ffn_norm)
            layer.attention.rotate = liger_rotary_pos_emb
            layer.feed_forward.gated = liger_swiglu

    def forward(
        self,
        embeddings: Tensor,
        *,
        image: ImageTokens | None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Tensor:
        """Run all blocks.

        Args:
            embeddings: [B, T, D].
            image: The image tokens.
            attention_mask: [B, past + T], 1 at real tokens; None: no padding that matters.
            position_ids: [B, T], restarting at 0 for each packed sample; None: they go on from the cache.
            past_key_values: transformers' cache, while generating.
            **options: For the attention, see ``attention.sample_arguments``.

        Returns:
            [B, T, D] last hidden states.
        """
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(past, past + embeddings.shape[1], device=embeddings.device)[None]
        mask = create_causal_mask(
            config=self.config, inputs_embeds=embeddings, attention_mask=attention_mask,
            past_key_values=past_key_values, position_ids=position_ids,
        )  # fmt: skip
        rotary = self.rotary_emb(embeddings, position_ids=position_ids)
        hidden = embeddings
        for layer in self.layers:
            hidden = layer(
                hidden, image=image, mask=mask, rotary=rotary,
                past_key_values=past_key_values, position_ids=position_ids, **options,
            )  # fmt: skip
        return self.norm(hidden)

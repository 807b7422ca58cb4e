"""The floating point operations that a training step really needs, counted from a model's shapes.

A product of [n, a] and [a, b] counts 2 n a b. Counted: every matrix product of the forward, for trained and
frozen parts; the gradient of each product's input wherever something in front of it trains; the gradient of
a weight only where that weight trains. So a frozen linear layer in a LoRA run costs 2 + 2 operations per
weight and token, a trained one 2 + 2 + 2, a frozen vision tower 2. Attention is counted over the pairs that the
mask lets through (half of them in the LLM, all within a slice in the vision tower), its backward twice its
forward. Logits are counted at supervised tokens alone. Not counted: padding, what checkpointing computes
again, the resampler's product of its own queries, dequantizing, norms, activations, softmax, the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn


@dataclass(frozen=True)
class ModelShape:
    """What of a model the count depends on.

    Attributes:
        llm: Weights of the LLM's linear layers, without the output layer.
        head: Weights of the output layer.
        llm_attention: Layers x (heads x head width) of the LLM.
        stem: Weights of the vision tower's first layer, whose input, the pixels, needs no gradient.
        vision: Weights of the tower's linear layers.
        vision_attention: Layers x width of the tower.
        resampler_first: Weights of the resampler's first layer, that every patch is multiplied by.
        resampler_patch: Those of its keys and values, likewise.
        resampler_query: Those that every query is multiplied by.
        width: Width of the LLM.
        queries: Queries per slice.
        layers: Layers of the LLM.
        key_width: Key heads x head width of the LLM.
        parameters: All parameters.
    """

    llm: int
    head: int
    llm_attention: int
    stem: int
    vision: int
    vision_attention: int
    resampler_first: int
    resampler_patch: int
    resampler_query: int
    width: int
    queries: int
    layers: int = 0
    key_width: int = 0
    parameters: int = 0


@dataclass(frozen=True)
class Trains:
    """What trains.

    Attributes:
        vision: The vision tower.
        resampler: The resampler.
        llm: The LLM's own weights, the output layer included.
        lora: Weights of LoRA matrices, each of which every token is multiplied by.
    """

    vision: bool
    resampler: bool
    llm: bool
    lora: int = 0


@dataclass(frozen=True)
class Work:
    """What goes through the model.

    Attributes:
        lengths: Tokens of every sample.
        patches: Patches of every slice.
        supervised: Supervised tokens.
    """

    lengths: Sequence[int]
    patches: Sequence[int]
    supervised: int


def shape_of(model: nn.Module) -> ModelShape:
    """Read the shape off a model of V-2 to V-4.5 without adapters, also one on the meta device."""
    config: Any = model.config
    text = config.text_config
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    width = text.hidden_size
    vision_layers = sum(
        1 for name, _ in model.vpm.named_modules() if name.count(".") == 2 and "layers." in name
    )
    vision_layers = vision_layers or len(getattr(model.vpm, "blocks", ()))
    vision_width = model.resampler.kv_proj.in_features
    return ModelShape(
        llm=_linear_weights(model.llm.model),
        head=model.llm.lm_head.in_features * model.llm.lm_head.out_features,
        llm_attention=text.num_hidden_layers * heads * head_width,
        stem=3 * 14 * 14 * vision_width,
        vision=_linear_weights(model.vpm),
        vision_attention=vision_layers * vision_width,
        resampler_first=vision_width * width,
        resampler_patch=2 * width**2,
        resampler_query=2 * width**2,
        width=width,
        queries=config.query_num,
        layers=text.num_hidden_layers,
        key_width=text.num_key_value_heads * head_width,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _linear_weights(module: nn.Module) -> int:
    return sum(
        each.in_features * each.out_features for each in module.modules() if isinstance(each, nn.Linear)
    )


def shape_of_folder(folder: Path) -> ModelShape:
    """Read the shape off a checkpoint's config.json alone."""
    from minicpm_tune.checkpoints.model_folder import detect_generation, read_config
    from minicpm_tune.planning.step_memory import build_on_meta

    return shape_of(build_on_meta(folder, detect_generation(read_config(folder))))


def needed_flops(shape: ModelShape, work: Work, trains: Trains) -> dict[str, float]:
    """Operations by part: vision, resampler, LLM, loss."""
    tokens, patches, slices = sum(work.lengths), sum(work.patches), len(work.patches)
    into_vision = trains.vision
    into_resampler = into_vision or trains.resampler
    # Adapters and embeddings stand in every layer, so the gradient goes all the way through the LLM.
    into_llm = into_resampler or trains.llm or trains.lora > 0
    llm = tokens * shape.llm * _products(into_llm, trains.llm) + tokens * trains.lora * _products(True, True)
    llm += _attention(sum(length**2 / 2 for length in work.lengths), shape.llm_attention, into_llm)
    vision = patches * shape.vision * _products(into_vision, trains.vision)
    vision += patches * shape.stem * _products(False, trains.vision)
    vision += _attention(sum(count**2 for count in work.patches), shape.vision_attention, into_vision)
    resampler = patches * shape.resampler_first * _products(into_vision, trains.resampler)
    inner = patches * shape.resampler_patch + slices * shape.queries * shape.resampler_query
    resampler += inner * _products(into_resampler, trains.resampler)
    resampler += _attention(shape.queries * patches, shape.width, into_resampler)
    loss = work.supervised * shape.head * _products(into_llm, trains.llm)
    return {"vision": vision, "resampler": resampler, "LLM": llm, "loss": loss}


def _products(gradient_of_input: bool, gradient_of_weight: bool) -> int:
    """Operations per weight and row of a linear layer."""
    return 2 * (1 + gradient_of_input + gradient_of_weight)


def _attention(pairs: float, width: int, backward: bool) -> float:
    """Scores and their weighted sum over all layers: 2 x 2 operations per pair and channel."""
    return 4 * pairs * width * (3 if backward else 1)

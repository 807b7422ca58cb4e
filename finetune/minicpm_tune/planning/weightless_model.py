"""A model and a batch on torch's meta device: the shapes of a run without its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minicpm_tune.batch import IGNORE_INDEX
from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.models.loading import model_class

_TAG_TOKENS = 2  # tokens around a placeholder


class QuantizedShape(nn.Linear):
    """A linear layer that takes as much memory as a quantized one of bitsandbytes.

    Each use, in the forward and again in the backward, makes the whole weight in ``dtype`` and drops it afterwards.
    """

    scales: Tensor

    def __init__(self, linear: nn.Linear, *, bits: int, dtype: torch.dtype):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        numbers = self.weight.numel()
        packed = torch.empty(numbers * bits // 8, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias
        # 4 bit: one byte per 64 weights and one fp32 per 256 of those; 8 bit: one fp32 per row.
        scales = numbers // 64 + 4 * (numbers // (64 * 256)) if bits == 4 else 4 * self.out_features
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8, device="meta"))
        self.dtype = dtype

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        out = _Dequantized.apply(hidden.to(self.dtype), self)
        return out if self.bias is None else out + self.bias

    def values(self) -> Tensor:
        """[out_features, in_features], as dequantizing makes them."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")


class _Dequantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, layer):
        ctx.layer = layer
        return hidden @ layer.values().t()

    @staticmethod
    def backward(ctx, slope):
        return slope @ ctx.layer.values(), None


def build_on_meta(
    folder: Path, generation: Generation, *, downsample_mode: str | None = None
) -> PreTrainedModel:
    """Make the model that a config.json describes on the meta device.

    Args:
        folder: The model folder.
        generation: Its generation.
        downsample_mode: 4.6 and 4.7: replaces that of config.json.
    """
    kind = model_class(generation)
    config = kind.config_class.from_pretrained(folder)
    config._attn_implementation = "sdpa"
    if downsample_mode is not None:
        config.downsample_mode = downsample_mode
    with torch.device("meta"):
        return kind(config)


def quantize_shapes(model: nn.Module, generation: Generation, *, bits: int, dtype: torch.dtype) -> None:
    """Replace the LLM's linear layers by quantized shapes, but for those that training keeps exact."""
    layers = tuple(f"{module}." for module in generation.modules["llm"])
    for name, module in list(model.named_modules()):
        exact = name.rpartition(".")[2] in generation.exact
        if type(module) is nn.Linear and name.startswith(layers) and not exact:
            model.set_submodule(name, QuantizedShape(module, bits=bits, dtype=dtype))


def largest_image(
    model: Any, generation: Generation, *, slices: int, room: int
) -> list[tuple[tuple[int, int], int]]:
    """The slices of an image that is cut as often as the limits allow.

    Args:
        model: A model of any generation.
        generation: Its generation.
        slices: Most slices, the overview included.
        room: Most tokens.

    Returns:
        For every slice, its (rows, columns) in patches and its tokens; empty when not even one fits.
    """
    tags = _TAG_TOKENS if generation.slice_tag else 0
    for count in range(slices, 0, -1):
        image = [(grid, model.slice_tokens(grid)) for grid in model.slice_grids(count)]
        if sum(tokens + tags for _, tokens in image) <= room:
            return image
    return []


def largest_batch(
    model: PreTrainedModel, generation: Generation, *, rows: int, length: int, slices: int
) -> dict[str, Any]:
    """A batch of full rows, each with one image of as many full slices as fit.

    Args:
        model: On the meta device; gives sizes and token ids.
        generation: Its generation.
        rows: Rows of the batch.
        length: Tokens of a row.
        slices: Slices of a row's image, the overview included.

    Returns:
        Arguments of the model's forward: pixels on the meta device, the rest real. Every token that is
        not a placeholder is supervised.
    """
    config = model.config
    input_ids = torch.zeros(rows, length, dtype=torch.int64)
    labels = input_ids.clone()
    sizes, bounds, start = [], [], 1
    for size, tokens in largest_image(model, generation, slices=slices, room=length - 1):
        input_ids[:, start : start + tokens] = getattr(config, "image_token_id", 0)
        labels[:, start : start + tokens] = IGNORE_INDEX
        sizes.append(size)
        bounds.append((start, start + tokens))
        start += tokens + _TAG_TOKENS
    all_sizes = torch.tensor(sizes * rows).reshape(-1, 2)
    all_bounds = [(row, *bound) for row in range(rows) for bound in bounds]
    patches = int(all_sizes.prod(dim=1).sum())
    return {
        "input_ids": input_ids,
        "labels": labels,
        "pixel_values": torch.empty(3, 14, 14 * patches, dtype=torch.uint8, device="meta"),
        "tgt_sizes": all_sizes,
        "image_bound": torch.tensor(all_bounds).reshape(-1, 3),
    }

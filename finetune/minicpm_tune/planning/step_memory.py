"""The memory of one training step, found by running the step on a model and a batch without numbers.

Tensors on the meta device have shapes and no contents, so a step of an 8B model runs in seconds on any machine
and needs no weights. Every storage that the step makes is counted from its creation to its end; the highest sum is
the peak. The step that runs is the training code itself, checkpointing and chunked loss included, so nothing here
has to follow changes of the model.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from minicpm_tune.batch import IGNORE_INDEX
from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.models.loading import model_class
from minicpm_tune.models.loss import LMHead

Attention = Callable[..., Tensor]

LABELS = ("vision", "activations", "logits")
# Operators that need the values of an index on the CPU to know the shape of their output.
_NEED_VALUES = (torch.ops.aten.index.Tensor, torch.ops.aten._to_copy.default)


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is entered.

    Attributes:
        label: What new storages are counted as.
        live: Label -> bytes alive now.
        peak: Label -> bytes at the moment when their sum was highest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.label = "activations"
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def leave_out(self, model: nn.Module) -> None:
        """Do not count a model's own parameters and buffers."""
        for tensor in [*model.parameters(), *model.buffers()]:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and count what it made."""
        kwargs = kwargs or {}
        tensors = [*_tensors(args), *_tensors(kwargs.values())]
        if func not in _NEED_VALUES and any(tensor.is_meta for tensor in tensors):
            if any(not tensor.is_meta and tensor.dim() for tensor in tensors):
                # Token ids, sizes and positions are real, so that code can look at them.
                args, kwargs = tree_map_only(Tensor, _as_meta, (args, kwargs))
        result = func(*args, **kwargs)
        for tensor in _tensors(result if isinstance(result, tuple | list) else (result,)):
            if tensor.is_meta:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if storage._cdata in self._known:
            return
        self._known[storage._cdata] = storage
        label, size = self.label, storage.nbytes()
        self.live[label] += size
        if self.live.total() > self.peak.total():
            self.peak = Counter(self.live)
        weakref.finalize(storage, self.live.subtract, {label: size})


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments or results of an operator, which nest at most once."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from (part for part in value if isinstance(part, Tensor))


def _as_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta") if tensor.device.type == "cpu" and tensor.dim() else tensor


class _LinearMemoryAttention(torch.autograd.Function):
    """Attention as the fused kernels hold it: no scores, one fp32 number per query kept for the backward."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        row_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, row_sums)
        return out

    @staticmethod
    def backward(ctx, slope):
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Stands in for ``F.scaled_dot_product_attention``, which makes all scores on the meta device."""
    return _LinearMemoryAttention.apply(query, key, value)


class AttentionInstead(TorchFunctionMode):
    """Calls ``attention`` wherever torch's own scaled-dot-product attention is called while it is entered.

    The product of experts and their tokens is replaced too, where the meta device has none (all but bf16, torch 2.13).

    torch suspends it during the backward; what checkpointing computes again enters its own, see
    ``checkpointing_options``.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        called = self.attention if func is F.scaled_dot_product_attention else func
        if func is F.grouped_mm and args[0].dtype != torch.bfloat16:
            called = _grouped_product
        return called(*args, **(kwargs or {}))


def _grouped_product(tokens: Tensor, weights: Tensor, *, offs: Tensor) -> Tensor:
    """[N, D], [E, D, F] -> [N, F], with the memory of ``F.grouped_mm`` in forward and backward."""
    return tokens @ weights[0]


def checkpointing_options(attention: Attention) -> dict[str, Any]:
    """Options of activation checkpointing under which the backward calls the same attention as the forward."""
    return {"use_reentrant": False, "context_fn": lambda: (nullcontext(), AttentionInstead(attention))}


def measure_step(
    model: nn.Module,
    generation: Generation,
    loss: Callable[[], Tensor],
    *,
    attention: Attention = fused_attention,
    after_gradient: Callable[[Tensor], object] = lambda gradient: None,
) -> Counter[str]:
    """Run forward and backward on the meta device and measure the peak of what they make.

    A parameter's gradient is dropped as soon as it is complete, because the caller counts complete gradients by
    the rules of ZeRO; the one being made counts here.

    Args:
        model: On the meta device, in training mode, possibly with an adapter.
        generation: Its generation.
        loss: Runs the forward.
        attention: Called instead of ``F.scaled_dot_product_attention``.
        after_gradient: Called with every complete gradient; what it makes counts.

    Returns:
        Label of ``LABELS`` -> bytes at the peak.
    """
    meter = StorageMeter()
    meter.leave_out(model)
    handles = [*_label_parts(model, generation, meter), *_drop_gradients(model, after_gradient)]
    try:
        with AttentionInstead(attention), meter:
            value = loss()
            meter.label = "logits"
            value.backward()
    finally:
        for handle in handles:
            handle.remove()
    return meter.peak


def _drop_gradients(model: nn.Module, after_gradient: Callable[[Tensor], object]) -> Iterator[Any]:
    def drop(parameter: Tensor) -> None:
        assert parameter.grad is not None, "a hook behind the gradient ran before it"
        after_gradient(parameter.grad)
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            yield parameter.register_post_accumulate_grad_hook(drop)


def _label_parts(model: nn.Module, generation: Generation, meter: StorageMeter) -> Iterator[Any]:
    """Tell the meter which part runs: by hooks in the forward, by gradients that are done in the backward."""
    for name, module in model.named_modules():
        plain = name.removeprefix("base_model.model.")
        if plain in generation.modules["vision"]:
            yield module.register_forward_pre_hook(partial(_enter, meter, "vision"))
        elif plain in generation.modules["resampler"]:
            yield module.register_forward_hook(partial(_leave_vision, meter))
        elif isinstance(module, LMHead):
            yield module.register_forward_pre_hook(partial(_enter_head, meter))


def _enter(meter: StorageMeter, label: str, *_: Any) -> None:
    meter.label = label


def _leave_vision(meter: StorageMeter, _module: nn.Module, _inputs: Any, output: Any) -> None:
    meter.label = "activations"
    if isinstance(output, Tensor) and output.requires_grad:
        output.register_hook(partial(_enter, meter, "vision"))  # the LLM's backward is done


def _enter_head(meter: StorageMeter, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
    meter.label = "logits"
    if inputs and inputs[0].requires_grad:
        inputs[0].register_hook(partial(_enter, meter, "activations"))  # the output layer's backward is done


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

"""The memory of one training step, found by running the step on tensors without numbers.

What would be on the GPU is a ``FakeTensor`` of torch: it has a shape, a dtype and a device and no numbers, so a step
of an 8B model runs in seconds on any machine and needs no weights. Every storage that the step makes is counted from
its creation to its end; the highest sum is the peak. The step that runs is the training code itself, checkpointing,
autocast and chunked loss included, so nothing here has to follow changes of the model.

The tensors say that they are on the CPU: a build of torch without CUDA knows no GPU, the meta device has no autocast,
and a CUDA build would take memory of the card. Where the CPU would do something else than a GPU, ``LikeGpu`` does
what a GPU does. ``tests/fake_cuda/test_memory.py`` compares the result with the same step on a CUDA device.
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
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.models.autocast import to_autocast_dtype
from minicpm_tune.models.loading import model_class
from minicpm_tune.models.loss import LMHead

Attention = Callable[..., Tensor]

LABELS = ("vision", "audio", "activations", "logits", "16-bit copies", "gradients")
# What autocast computes in fp32 on a GPU and as it comes on a CPU, of what the models call (torch 2.13,
# ATen/autocast_mode.h).
_FP32_ON_GPU = frozenset(
    "layer_norm group_norm softmax log_softmax softplus exp log log1p pow rsqrt reciprocal cumsum cumprod prod "
    "sum norm logsumexp cosine_similarity".split()
)


class StepMeter(TorchDispatchMode):
    """Runs on tensors without contents what has one among its arguments, and counts the bytes of all it makes.

    What has none (token ids, sizes, positions on the CPU) runs for real, so that code can look at it.

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
        self._fake = FakeTensorMode()
        self._known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._labels: dict[int, str] = {}  # of the storages that are counted
        self._weights: set[int] = set()

    def take(self, model: nn.Module) -> None:
        """Give a model of the meta device tensors of this meter; its own tensors do not count."""
        taken: dict[int, Tensor] = {}
        for store in (store for module in model.modules() for store in (module._parameters, module._buffers)):
            for name, value in store.items():
                if value is None:
                    continue
                if id(value) not in taken:
                    taken[id(value)] = self._own(value)
                store[name] = taken[id(value)]  # type: ignore[assignment]

    def _own(self, value: Tensor) -> Tensor:
        with self._fake:
            made = torch.empty(value.shape, dtype=value.dtype)
        storage = made.untyped_storage()
        self._known[storage._cdata] = storage
        if isinstance(value, nn.Parameter):
            self._weights.add(storage._cdata)
            return nn.Parameter(made, requires_grad=value.requires_grad)
        return made

    def put(self, value: Any) -> Any:
        """A tensor of the batch as it arrives on the device; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        with self._fake:
            made = torch.empty(value.shape, dtype=value.dtype)
        self._count(made.untyped_storage(), self.label)
        return made

    def recount(self, tensor: Tensor, label: str) -> None:
        """Count a tensor that the step has made as something else."""
        key = tensor.untyped_storage()._cdata
        if key in self._labels:
            size = tensor.untyped_storage().nbytes()
            self.live.subtract({self._labels[key]: size})
            self.live[label] += size
            self._labels[key] = label

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and count what it made."""
        kwargs = kwargs or {}
        given = [value for value in _tensors(args) if isinstance(value, FakeTensor)]
        if not (given or any(isinstance(value, FakeTensor) for value in kwargs.values())):
            return func(*args, **kwargs)
        if any(not isinstance(value, FakeTensor) for value in _tensors(args)):
            args = tree_map_only(Tensor, self._without_contents, args)
        result = self._fake.__torch_dispatch__(func, types, args, kwargs)
        label = self.label
        if func is torch.ops.aten._to_copy.default and given[0].untyped_storage()._cdata in self._weights:
            label = "16-bit copies"
        elif func is torch.ops.aten.embedding_dense_backward.default:
            label = "gradients"  # as large as the table; it is known to be one only when it is done
        for tensor in _tensors(result if isinstance(result, tuple | list) else (result,)):
            self._count(tensor.untyped_storage(), label)
        return result

    def _without_contents(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self._fake.from_tensor(tensor)

    def _count(self, storage: Any, label: str) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage
        self._labels[key] = label
        self.live[label] += storage.nbytes()
        if self.live.total() > self.peak.total():
            self.peak = Counter(self.live)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self.live.subtract({self._labels.pop(key): size})


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments or results of an operator, which nest at most once."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from (part for part in value if isinstance(part, Tensor))


class _LinearMemoryAttention(torch.autograd.Function):
    """Attention as the fused kernels hold it: no scores, one fp32 number per query kept for the backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, length, _ = query.shape
        # Heads lie beside each other within a token, as in what these kernels give.
        out = query.new_empty((rows, length, heads, value.shape[-1])).transpose(1, 2)
        row_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, row_sums)
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Stands in for ``F.scaled_dot_product_attention``, which has no fused kernel for every mask on a CPU."""
    return _LinearMemoryAttention.apply(*(to_autocast_dtype(part) for part in (query, key, value)))


class LikeGpu(TorchFunctionMode):
    """Computes as on a GPU what torch computes otherwise on a CPU, while it is entered.

    The product of experts and their tokens is replaced too, where a CPU has none (all but bf16, torch 2.13).

    torch suspends it during the backward; what checkpointing computes again enters its own, see
    ``checkpointing_options``.

    Args:
        attention: Called wherever torch's own scaled-dot-product attention is called.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is torch._grouped_mm and args[0].dtype != torch.bfloat16:
            return _grouped_product(*args, **kwargs)
        if func.__name__ in _FP32_ON_GPU and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(FakeTensor, _in_fp32, (args, kwargs))
        return func(*args, **kwargs)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """What is dropped is remembered as one byte per number."""
    return torch.native_dropout(input, p, train=True)[0] if training and p else input


def _in_fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _grouped_product(tokens: Tensor, weights: Tensor, **_: Any) -> Tensor:
    """[N, D], [E, D, F] -> [N, F], with the memory of ``F.grouped_mm`` in forward and backward."""
    return tokens @ weights[0]


def checkpointing_options(attention: Attention) -> dict[str, Any]:
    """Options of activation checkpointing under which the backward computes what the forward did."""
    return {"context_fn": lambda: (nullcontext(), LikeGpu(attention))}


def measure_step(
    model: nn.Module,
    generation: Generation,
    batch: dict[str, Any],
    loss: Callable[[Any, dict[str, Any]], Tensor],
    *,
    attention: Attention = fused_attention,
    autocast: torch.dtype | None = None,
    keep_gradients: bool = False,
    copy_gradients: bool = False,
) -> Counter[str]:
    """Run forward and backward on tensors without contents and measure the peak of what they make.

    Args:
        model: On the meta device, in training mode, possibly with an adapter. Its tensors are replaced.
        generation: Its generation.
        batch: What its forward takes, on the CPU.
        loss: Runs the forward.
        attention: Called instead of ``F.scaled_dot_product_attention``.
        autocast: What autocast computes in; None: there is no autocast.
        keep_gradients: Whether gradients stay and count, as where an optimizer step follows every backward. Otherwise
            a parameter's gradient is dropped as soon as it is complete, and the caller counts complete ones.
        copy_gradients: Whether every complete gradient is copied, which counts for as long as that takes.

    Returns:
        Label of ``LABELS`` -> bytes at the peak.
    """
    meter = StepMeter()
    meter.take(model)

    def complete(parameter: Tensor) -> None:
        assert parameter.grad is not None, "a hook behind the gradient ran before it"
        if copy_gradients:
            torch.empty_like(parameter.grad)
        if keep_gradients:
            meter.recount(parameter.grad, "gradients")
        else:
            parameter.grad = None

    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    handles = [*_label_parts(model, generation, meter)]
    handles += [parameter.register_post_accumulate_grad_hook(complete) for parameter in trained]
    inputs = {name: meter.put(value) for name, value in batch.items()}
    try:
        with LikeGpu(attention), meter:
            with nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast):
                value = loss(model, inputs)
            meter.label = "logits"
            value.backward()
    finally:
        for handle in handles:
            handle.remove()
    return meter.peak


def _label_parts(model: nn.Module, generation: Generation, meter: StepMeter) -> Iterator[Any]:
    """Tell the meter which part runs: by hooks in the forward, by gradients that are done in the backward."""
    for name, module in model.named_modules():
        plain = name.removeprefix("base_model.model.")
        if plain in generation.modules["vision"]:
            yield module.register_forward_pre_hook(partial(_enter, meter, "vision"))
        elif plain in generation.modules.get("audio", ()):
            yield module.register_forward_pre_hook(partial(_enter, meter, "audio"))
        elif plain in generation.modules["resampler"]:
            yield module.register_forward_hook(partial(_leave_vision, meter))
        elif isinstance(module, LMHead):
            yield module.register_forward_pre_hook(partial(_enter_head, meter))


def _enter(meter: StepMeter, label: str, *_: Any) -> None:
    meter.label = label


def _leave_vision(meter: StepMeter, _module: nn.Module, _inputs: Any, output: Any) -> None:
    meter.label = "activations"
    if isinstance(output, Tensor) and output.requires_grad:
        output.register_hook(partial(_enter, meter, "vision"))  # the LLM's backward is done


def _enter_head(meter: StepMeter, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
    meter.label = "logits"
    if inputs and inputs[0].requires_grad:
        inputs[0].register_hook(partial(_enter, meter, "activations"))  # the output layer's backward is done


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
        return self.weight.new_empty((self.out_features, self.in_features), dtype=self.dtype)


class _Dequantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layer: QuantizedShape) -> Tensor:
        ctx.layer = layer
        return hidden @ layer.values().t()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
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

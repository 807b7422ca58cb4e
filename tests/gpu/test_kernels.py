"""Kernels of a GPU give what the CPU gives: attention, the loss, quantized layers, optimizers.

Expected values are computed in fp64 or fp32 on the CPU. Errors are relative, ||found - expected|| / ||expected||: bf16
operands leave 1e-3 to 1e-2, fp32 below 1e-5, and NaN never passes.
"""

import pytest
import torch
import torch.nn.functional as F

from minicpm_tune.models.attention import _has_varlen_kernel, attend_within_samples, attend_within_slices
from minicpm_tune.models.batch_layout import SampleLayout
from minicpm_tune.models.loss import LMHead

pytestmark = pytest.mark.gpu

HALF = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # dtype -> largest relative error


def error(found, expected):
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((found - expected).norm() / expected.norm()).item()


def drawn(*shape, dtype, device):
    """A random tensor on the device, and the same numbers on the CPU in fp64; both want gradients."""
    there = torch.randn(shape, dtype=torch.float32).to(device, dtype)
    return there.requires_grad_(), there.detach().double().cpu().requires_grad_()


def gradients_agree(found, expected, parts, exact, limit):
    """Compare results and the gradients of all parts under one random slope."""
    assert error(found, expected) < limit
    slope = torch.randn(expected.shape, dtype=torch.float64)
    found.backward(slope.to(found.device, found.dtype))
    expected.backward(slope)
    errors = [error(part.grad, whole.grad) for part, whole in zip(parts, exact, strict=True)]
    assert max(errors) < limit, errors


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("width", [64, 72, 128])
def test_attention_within_slices(gpu, width, dtype):
    torch.manual_seed(0)
    lengths, heads = [5, 5, 64, 300, 300, 1], 4
    pairs = [drawn(sum(lengths), heads, width, dtype=dtype, device=gpu) for _ in range(3)]
    parts, exact = zip(*pairs, strict=True)
    if gpu == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        assert _has_varlen_kernel(parts[0])
    found, expected = (attend_within_slices(*each, lengths=lengths) for each in (parts, exact))
    gradients_agree(found, expected, parts, exact, HALF[dtype])


@pytest.mark.parametrize("width", [64, 128])
def test_attention_of_a_resampler_to_the_patches_of_its_slice(gpu, width):
    torch.manual_seed(0)
    lengths, heads, queries = [64, 300, 7], 4, 16
    sizes = (queries * len(lengths), sum(lengths), sum(lengths))
    pairs = [drawn(size, heads, width, dtype=torch.bfloat16, device=gpu) for size in sizes]
    parts, exact = zip(*pairs, strict=True)
    found, expected = (
        attend_within_slices(*each, lengths=lengths, query_length=queries) for each in (parts, exact)
    )
    gradients_agree(found, expected, parts, exact, HALF[torch.bfloat16])


def causal_one_by_one(query, key, value, lengths):
    """[1, N, H, E]: each sample by itself under a mask."""
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    samples = zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
    mixed = [
        F.scaled_dot_product_attention(
            *one, attn_mask=torch.ones(one[0].shape[2], one[0].shape[2]).tril().bool()
        )
        for one in samples
    ]
    return torch.cat(mixed, dim=2).transpose(1, 2)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("key_heads", [8, 2])
@pytest.mark.parametrize("width", [64, 128])
def test_attention_of_packed_samples(gpu, width, key_heads, dtype):
    torch.manual_seed(0)
    lengths = [3, 1, 200, 64]
    pairs = [
        drawn(1, heads, sum(lengths), width, dtype=dtype, device=gpu) for heads in (8, key_heads, key_heads)
    ]
    parts, exact = zip(*pairs, strict=True)
    ends = SampleLayout((tuple(lengths),), sum(lengths), torch.device(gpu)).ends
    found, _ = attend_within_samples(None, *parts, None, sample_lengths=lengths, sample_ends=ends)
    gradients_agree(found, causal_one_by_one(*exact, lengths), parts, exact, HALF[dtype])


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), *HALF.items()])
@pytest.mark.parametrize("chunk", [None, 7])
def test_the_loss_of_supervised_tokens(gpu, dtype, limit, chunk):
    torch.manual_seed(0)
    tokens, width, vocabulary = 50, 64, 1000
    hidden, exact_hidden = drawn(tokens, width, dtype=dtype, device=gpu)
    head, exact_head = LMHead(width, vocabulary, bias=False), torch.nn.Linear(width, vocabulary, bias=False)
    weight = torch.randn(vocabulary, width).to(dtype) / width**0.5
    head.weight.data, exact_head.weight.data = weight.to(gpu), weight.double()
    labels = torch.randint(vocabulary, (tokens,))
    found, correct, each = head(hidden, labels=labels.to(gpu), chunk=chunk)
    logits = exact_head(exact_hidden)
    expected = F.cross_entropy(logits, labels, reduction="none")
    assert error(each, expected) < limit
    assert abs(correct.item() - (logits.argmax(-1) == labels).sum().item()) <= 1
    found.backward()
    expected.sum().backward()
    assert error(hidden.grad, exact_hidden.grad) < 2 * limit
    assert error(head.weight.grad, exact_head.weight.grad) < 2 * limit


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_layers_hold_what_the_cpu_quantizes(gpu, kind):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = torch.randn(256, 512)
    expected, found = (
        functional.dequantize_4bit(*functional.quantize_4bit(weight.to(device), quant_type=kind))
        for device in ("cpu", gpu)
    )
    assert error(found, expected) < 1e-3


@pytest.mark.parametrize("tokens", [1, 64])
def test_a_four_bit_layer_multiplies_as_its_dequantized_weight_does(gpu, tokens):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(
        512, 256, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    ).to(gpu)
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    inputs, exact = drawn(tokens, 512, dtype=torch.bfloat16, device=gpu)
    expected = exact @ weight.double().cpu().t()
    gradients_agree(layer(inputs), expected, [inputs], [exact], HALF[torch.bfloat16])


def test_eight_bit_adam_steps_about_as_adam_does(gpu):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    start, gradients = (
        torch.randn(128, 64),
        torch.randn(5, 128, 64),
    )  # 4096 numbers and more are held in 8 bits
    moved = []
    for kind in (torch.optim.AdamW, bitsandbytes.optim.AdamW8bit):
        parameter = torch.nn.Parameter(start.clone().to(gpu))
        optimizer = kind([parameter], lr=1e-2, weight_decay=0.0)
        for gradient in gradients:
            parameter.grad = gradient.to(gpu)
            optimizer.step()
        moved.append(parameter.detach().cpu() - start)
    assert error(moved[1], moved[0]) < 0.1

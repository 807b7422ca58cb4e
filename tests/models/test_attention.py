"""Attention within samples: equal to a mask, whatever the kernel, and chosen by what the device can do."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from minicpm_tune.models import attention
from minicpm_tune.models.attention import (
    WITHIN_SAMPLES,
    attend_within_samples,
    keep_samples_apart,
    sample_arguments,
)
from minicpm_tune.models.batch_layout import SampleLayout

LENGTHS = [3, 1, 70, 8]
TOLERANCE = 2e-6  # 4.8e-7, fp32


def heads(kv_heads=2):
    torch.manual_seed(0)
    total = sum(LENGTHS)
    return [torch.randn(1, count, total, 16, requires_grad=True) for count in (4, kv_heads, kv_heads)]


def masked(query, key, value):
    """The same with a dense mask over all tokens."""
    sample = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    mask = (sample[:, None] == sample[None, :]).tril()
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_samples_attend_as_under_a_dense_mask(kv_heads):
    parts = heads(kv_heads)
    found, weights = attend_within_samples(None, *parts, None, sample_lengths=LENGTHS)
    expected = masked(*parts)
    assert weights is None
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    slope = torch.randn_like(expected)
    for own, wanted in zip(
        torch.autograd.grad(found, parts, slope), torch.autograd.grad(expected, parts, slope), strict=True
    ):
        torch.testing.assert_close(own, wanted, atol=10 * TOLERANCE, rtol=0)


def test_the_kernel_gets_the_samples_of_all_rows_at_once(monkeypatch):
    """A stand-in for torch's variable-length kernel, which this machine does not have."""
    seen = []

    def kernel(query, key, value, query_ends, key_ends, longest_query, longest_key, **options):
        seen.append((query_ends.tolist(), key_ends.tolist(), longest_query, longest_key, options))
        rows = [part.transpose(0, 1)[None] for part in (query, key, value)]
        return masked(*rows)[0]

    import torch.nn.attention.varlen as varlen

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_has_varlen_kernel", lambda query: True)
    parts = heads()
    samples = SampleLayout((tuple(LENGTHS),), sum(LENGTHS), torch.device("cpu"))
    found, _ = attend_within_samples(
        None, *parts, None, sample_lengths=LENGTHS, sample_ends=samples.ends, scaling=0.25
    )
    torch.testing.assert_close(found, masked(*parts), atol=TOLERANCE, rtol=0)
    ends = [0, 3, 4, 74, 82]
    assert seen == [(ends, ends, 70, 70, {"scale": 0.25, "window_size": (-1, 0), "enable_gqa": True})]


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "expected"),
    [
        ((7, 5), torch.float16, 64, False),
        ((8, 6), torch.float16, 64, True),
        ((9, 0), torch.bfloat16, 72, True),
        ((9, 0), torch.bfloat16, 20, False),
        ((9, 0), torch.float32, 64, False),
    ],
)
def test_the_kernel_is_chosen_by_what_the_card_can_do(monkeypatch, capability, dtype, width, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    query = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(5, 4, width), device="cuda:0")
    assert attention._has_varlen_kernel(query) is expected


def test_llms_are_told_the_samples_in_the_words_of_their_attention():
    samples = SampleLayout(((3, 2), (4,)), 6, torch.device("cpu"))
    config = SimpleNamespace(_attn_implementation="sdpa")
    keep_samples_apart(config)
    assert config._attn_implementation == WITHIN_SAMPLES
    own = sample_arguments(config, samples)
    assert (own["sample_lengths"], own["sample_ends"].tolist()) == ([3, 2, 4], [0, 3, 5, 9])
    assert own["attention_mask"].ndim == 4  # transformers takes it as finished
    flash = sample_arguments(SimpleNamespace(_attn_implementation="flash_attention_2"), samples)
    assert flash["cu_seq_lens_q"].tolist() == flash["cu_seq_lens_k"].tolist() == [0, 3, 5, 9]
    assert flash["cu_seq_lens_q"].dtype == torch.int32
    assert (flash["max_length_q"], flash["max_length_k"], flash["attention_mask"]) == (4, 4, None)


def test_an_llm_with_windows_keeps_its_own_attention():
    config = SimpleNamespace(_attn_implementation="sdpa", layer_types=["full_attention", "sliding_attention"])
    keep_samples_apart(config)
    assert config._attn_implementation == "sdpa"
    samples = SampleLayout(((3,),), 3, torch.device("cpu"))
    assert sample_arguments(config, samples) == {"attention_mask": None}


def test_padding_is_left_out_and_put_back():
    samples = SampleLayout.of(None, torch.tensor([[1, 1, 1], [1, 0, 0]]), device=torch.device("cpu"))
    rows = torch.arange(6.0).view(2, 3, 1) + 1
    taken = samples.take(rows)
    assert taken.flatten().tolist() == [1, 2, 3, 4]
    assert samples.put(taken).flatten().tolist() == [1, 2, 3, 4, 0, 0]
    assert samples.rank(torch.tensor([3, 1])).tolist() == [3, 1]
    assert samples.positions.tolist() == [0, 1, 2, 0]

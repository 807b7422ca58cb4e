"""The gated delta-net layer on packed rows against transformers' layer on each sample."""

import copy
import itertools

import pytest
import torch

from minicpm_tune.models.minicpmv46 import delta_net as delta_net_module
from minicpm_tune.models.minicpmv46.delta_net import SpreadLayout
from support.minicpmv46_cases import golden_config, one_thread


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def delta_net(seed=0):
    config = golden_config("v4_6").text_config
    torch.manual_seed(seed)
    layer = delta_net_module.Qwen3_5GatedDeltaNet(config, 0)
    torch.nn.init.normal_(layer.A_log, std=0.5)
    torch.nn.init.normal_(layer.in_proj_qkv.weight, std=0.3)
    packed = copy.deepcopy(layer)
    packed.__class__ = delta_net_module.PackedDeltaNet
    return layer, packed


LENGTHS = [(3,), (64, 1, 63), (59, 60, 61, 62), (62, 63, 64, 5), (65, 128, 3), (2, 2, 2, 130, 1)]


def layout_of(lengths):
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return SpreadLayout.of(positions, torch.ones_like(positions), gap=4, device=torch.device("cpu"))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kernel", [False, True])
def test_delta_net_of_a_packed_row_equals_the_layer_on_each_sample(lengths, kernel, monkeypatch):
    layer, packed = delta_net()
    if kernel:  # the branch for a kernel that takes all samples in one row, with their ends
        monkeypatch.setattr(delta_net_module, "_kernel_at_hand", lambda states: True)
        monkeypatch.setattr(delta_net_module, "_kernel_rule", rule_by_ends)
    hidden = torch.randn(1, sum(lengths), 64, requires_grad=True)
    expected = torch.cat([layer(part) for part in hidden.split(lengths, dim=1)], dim=1)
    found = packed(hidden, samples=layout_of(lengths))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    slope = torch.randn_like(expected)
    parameters = list(zip(layer.parameters(), packed.parameters(), strict=True))
    expected_grads = torch.autograd.grad(expected, [hidden, *[pair[0] for pair in parameters]], slope)
    grads = torch.autograd.grad(found, [hidden, *[pair[1] for pair in parameters]], slope)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert float((grad - expected_grad).norm() / expected_grad.norm()) <= 1e-4


def rule_by_ends(query, key, value, *, g, beta, use_qk_l2norm_in_kernel, cu_seqlens):
    ends = cu_seqlens.tolist()
    parts = [
        delta_net_module._torch_rule(
            query[:, start:end], key[:, start:end], value[:, start:end],
            g=g[:, start:end], beta=beta[:, start:end],
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        )[0]
        for start, end in itertools.pairwise(ends)
    ]  # fmt: skip
    return torch.cat(parts, dim=1), None


def test_nothing_of_a_sample_is_left_in_the_state_of_the_next():
    _, packed = delta_net()
    lengths = (61, 62, 5)
    hidden = torch.randn(1, sum(lengths), 64)
    with torch.no_grad():
        before = packed(hidden, samples=layout_of(lengths))
        hidden[:, :61] *= 1e6
        after = packed(hidden, samples=layout_of(lengths))
    assert torch.equal(before[:, 61:], after[:, 61:])

"""The estimate of a step's time: each operator takes the longest of its three times."""

from types import SimpleNamespace

import pytest
import torch

from roofline import Card, Fused, Operators, seconds

CARD = Card(peak=100.0, bytes=10.0)
GIVEN = SimpleNamespace(
    matrix_rate=0.5, bandwidth=0.5, launch=1e6, attention=0.5, masked_attention=0.25, samples=4
)


def test_the_longest_of_three_times_counts():
    rows = [(200.0, 1.0), (1.0, 20.0), (1.0, 1.0)]  # 4 s of operations, 4 s of bytes, 1 s of launch
    assert seconds(CARD, rows, [], GIVEN, dense=False) == (9.0, 202.0)


def test_packed_samples_see_a_part_of_the_pairs_and_a_mask_computes_all():
    attention = [(800.0, 1)]
    variable, needed = seconds(CARD, [], attention, GIVEN, dense=False)
    dense, again = seconds(CARD, [], attention, GIVEN, dense=True)
    assert needed == again == 100.0
    assert variable == pytest.approx(100 / (50 * 0.5))
    assert dense == pytest.approx(800 / (50 * 0.25))


def test_a_fused_kernel_reads_its_inputs_and_writes_once(monkeypatch):
    monkeypatch.setattr(Operators, "rows", [])
    hidden, weight = torch.zeros(10, 4, requires_grad=True), torch.zeros(4)
    Fused.apply(hidden, weight).sum().backward()
    whole, small = 4.0 * 40, 4.0 * 4
    forward, backward = 2 * whole + small, 3 * whole + small  # the weight is frozen
    assert Operators.rows == [(0.0, forward), (0.0, backward)]

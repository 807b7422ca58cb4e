"""The estimate of a step's time: each operator takes the longest of its three times."""

from types import SimpleNamespace

import pytest

from roofline import Card, seconds

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

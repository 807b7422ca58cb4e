"""Shared by all tests: the product's modules are importable as they are under torchrun."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

TESTS = Path(__file__).resolve().parent
# The product as under torchrun, the demo, the benchmarks, and the tests' own ``support``.
for folder in (TESTS.parent / "finetune", TESTS.parent / "demo", TESTS.parent / "benchmarks", TESTS):
    sys.path.insert(0, str(folder))

# More threads than idle cores wait for each other by spinning, ten times slower.
torch.set_num_threads(1)

# A busy machine is no failure: no example has a time limit of its own.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none, and say so."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))

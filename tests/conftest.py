"""What holds for all tests."""

import os

import pytest
import torch
from hypothesis import settings

from support.processes import end_what_runs

# More threads than idle cores wait for each other by spinning, ten times slower.
torch.set_num_threads(1)

# A busy machine is no failure: no example has a time limit of its own.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    """End what a test has started, also when it failed; a test that passed has ended everything itself."""
    yield
    left = end_what_runs()
    assert not left, f"left running:\n{left}"


# Set to 1, tests marked gpu run on the CPU: their comparisons mean little there, but a slip in them shows.
REHEARSE = "REHEARSE_GPU_TESTS"


@pytest.fixture(scope="session")
def gpu():
    """The device of the tests marked gpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none, and say so."""
    if not torch.cuda.is_available() and os.environ.get(REHEARSE) != "1":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))

"""What holds for all tests."""

import logging
import os
import signal
import sys

import pytest
import torch
from hypothesis import settings

from minicpm_tune.logs import ROOT
from support.processes import end_what_runs

# More threads than idle cores wait for each other by spinning, ten times slower.
torch.set_num_threads(1)

# Under nohup what tests start would ignore SIGHUP too. A handler is not handed on, and still keeps the tests alive.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

# A busy machine is no failure: no example has a time limit of its own.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@pytest.fixture(autouse=True)
def random_numbers_are_the_same_in_any_order_of_tests():
    """Start every test with the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    """End what a test has started, also when it failed; a test that passed has ended everything itself."""
    yield
    left = end_what_runs()
    assert not left, f"left running:\n{left}"


@pytest.fixture(autouse=True)
def logs_are_as_before():
    """Undo what a command that ran within the test has set: its log lines go to a stream that the test closes."""
    root, ours = logging.getLogger(), logging.getLogger(ROOT)
    handlers, levels, streams = root.handlers[:], (root.level, ours.level), (sys.stdout, sys.stderr)
    raises = logging.raiseExceptions
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    sys.stdout, sys.stderr = streams
    logging.raiseExceptions = raises


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

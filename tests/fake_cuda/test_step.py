"""A training step on a GPU that is not there: devices, dtypes, kernels and waits, in every way of training.

What runs is ``support/fake_cuda_worker.py``, on the device of ``support/fake_cuda_device.cpp``.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from make_checkpoint import make_checkpoint
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from support import processes
from support.paths import SUPPORT

LIMIT = 400  # seconds for all cases of a generation; 15 alone on a core
# One of each family, and the one whose attention differs; the others with the slow tests.
# Copies to the device that block, in a step: transformers' own vision tower of 4.6 makes them of the slices' sizes
# (5.23); they are small, and nothing is computed before them.
WAITS = {"minicpmv46": 5}
ONE_OF_A_FAMILY = ("v2_6", "v4_6", "xc2_4khd_7b")


@pytest.fixture(scope="session")
def device(tmp_path_factory):
    """The compiled device."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to compile a device that does nothing")
    library = tmp_path_factory.mktemp("fake_cuda") / "device.so"
    root = Path(torch.__file__).parent
    headers = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    source = SUPPORT / "fake_cuda_device.cpp"
    done = processes.run(
        [compiler, "-std=c++20", "-shared", "-fPIC", *headers, source, "-o", library, *libraries], limit=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return library


def steps(device, folder, generation, *words):
    """What every way of training did."""
    checkpoint = make_checkpoint(folder / "model", generation, size="tiny")
    worker = [sys.executable, SUPPORT / "fake_cuda_worker.py", device, generation, checkpoint, *words]
    done = processes.run(worker, limit=LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def errors(found):
    """The errors, each once with the first way of training that had it."""
    first = {}
    for case in found:
        if "error" in case:
            way = {name: value for name, value in case.items() if name != "error"}
            first.setdefault(case["error"].splitlines()[-1], f"{way}\n{case['error']}")
    return "\n".join(first.values())


@pytest.mark.parametrize(
    "generation",
    [name if name in ONE_OF_A_FAMILY else pytest.param(name, marks=pytest.mark.slow) for name in GENERATIONS],
)
def test_a_step_runs_on_a_gpu_in_half_precision_without_a_wait(device, tmp_path, generation):
    found = steps(device, tmp_path, generation)
    # Slices of CLIP, and windows of 4.6's merger.
    equal = GENERATIONS[generation].family in ("minicpmv46", "xcomposer2")
    assert len(found) == 20
    assert not errors(found)
    for case in found:
        assert case["loss"] == "torch.float32", case
        assert case["without gradient"] == [], case
        assert len(case["waits"]) == WAITS.get(GENERATIONS[generation].family, 0), case
        # One kernel for all slices or samples of a batch, and never a mask; what is all of one length needs none.
        # The audio encoder's blocks of a second have no such kernel.
        dense = equal or GENERATIONS[generation].hearing is not None
        assert set(case["attention"]) == ({"varlen", "sdpa"} if dense else {"varlen"}), case


def test_cards_before_ampere_get_attention_that_they_have(device, tmp_path):
    found = steps(device, tmp_path, "v2_6", "7.5")
    assert {case["precision"] for case in found} == {"fp16 autocast", "fp16"}
    assert not errors(found)
    assert all(set(case["attention"]) == {"sdpa"} for case in found), found


def test_what_would_fail_on_a_gpu_fails_here(device, tmp_path):
    (found,) = steps(device, tmp_path, "v2_6", "9.0", "itself")
    assert found == {
        "reading a value": "DataDependentOutputException",
        "a shape that depends on values": "DynamicOutputShapeException",
        "two devices": "FakeTensorDeviceMismatchError",
        "two dtypes": "TypeError",
        "copies": ["aten._to_copy.default"] * 2,  # back, and there with blocking
    }

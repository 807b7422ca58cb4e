"""A training step on a GPU that is not there: devices, dtypes, kernels and waits, in every way of training.

What runs is ``support/fake_cuda_worker.py``, on the device of ``support/fake_cuda_device.cpp``.
"""

import json
import sys
from pathlib import Path

import pytest

from make_checkpoint import make_checkpoint
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from support import processes
from support.paths import SUPPORT

LIMIT = 400  # seconds for the jobs of a process; 20 alone on a core
CARDS = ((7, 5), (8, 6), (9, 0))  # capabilities of a T4, an RTX 3090, an H100
# The others with the slow tests.
ONE_OF_A_FAMILY = ("v2_6", "v4_6", "xc2_4khd_7b")


def steps(device, folder, jobs):
    """What every way of training did in each job, all in one process; a job's generation becomes a checkpoint."""
    for job in jobs.values():
        if job:
            name = job["generation"]
            job["checkpoint"] = str(folder / name / "model")
            if not Path(job["checkpoint"]).exists():
                make_checkpoint(Path(job["checkpoint"]), name, size="tiny")
    worker = [sys.executable, SUPPORT / "fake_cuda_worker.py", device, json.dumps(jobs)]
    done = processes.run(worker, limit=LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: [] for name in jobs}
    for line in done.stdout.splitlines():
        case = json.loads(line)
        found[case.pop("job")].append(case)
    return found


@pytest.fixture(scope="session")
def found(device, tmp_path_factory):
    """What the quick tests look at."""
    jobs = {name: {"generation": name, "cases": "few"} for name in ONE_OF_A_FAMILY}
    packed = {"generation": "v4_5", "cases": "packed"}
    jobs |= {
        f"capability {major}.{minor}": {**packed, "capability": (major, minor)} for major, minor in CARDS
    }
    jobs["flash"] = {**packed, "attention": "flash_attention_2"}
    jobs["itself"] = {}
    return steps(device, tmp_path_factory.mktemp("fake_cuda_models"), jobs)


def errors(found):
    """The errors, each once with the first way of training that had it."""
    first = {}
    for case in found:
        if "error" in case:
            way = {name: value for name, value in case.items() if name != "error"}
            first.setdefault(case["error"].splitlines()[-1], f"{way}\n{case['error']}")
    return "\n".join(first.values())


def check(generation, cases):
    """What holds of every generation."""
    # Slices of CLIP, and windows of 4.6's merger.
    equal = GENERATIONS[generation].family in ("minicpmv46", "xcomposer2")
    assert not errors(cases)
    without_autocast = {
        (case["packing"], case["method"]): case["cast"] for case in cases if case["precision"] == "bf16"
    }
    for case in cases:
        assert case["loss"] == "torch.float32", case
        assert case["without gradient"] == [], case
        assert case["waits"] == [], case
        # One kernel for all slices or samples of a batch, and never a mask; what is all of one length needs none.
        # The audio encoder's blocks of a second have no such kernel.
        dense = equal or GENERATIONS[generation].hearing is not None
        assert set(case["attention"]) == ({"varlen", "sdpa"} if dense else {"varlen"}), case
        # The sums through all layers. Those of fp16, which ends at 65,504, stay fp32 where embeddings train.
        half = {"bf16": "bfloat16", "fp16": "float16"}[case["precision"].split()[0]]
        if case["precision"] == "fp16 autocast":
            assert "float32" in case["blocks"], case
        else:
            assert case["blocks"] == [half], case
        expected = without_autocast.get((case["packing"], case["method"]))
        if case["method"] == "full" and GENERATIONS[generation].family == "xcomposer2":
            # Small, they have many more numbers between layers than weights: with and without fp32 sums 7.4 and 7.9
            # million bytes. Their adapters' runs show it, with 4.1 and 3.4.
            continue
        if case["precision"] == "bf16 autocast" and expected and not case["checkpointing"]:
            # Trained weights are rounded once (2 bytes), their gradients widened once (4 bytes), and so are the
            # embeddings that the layers start from. With fp32 sums v2_6 has 10.8 million bytes, and 6.0 without.
            assert case["cast"] < 1.2 * expected + 7 * case["trained"], case


@pytest.mark.parametrize("generation", ONE_OF_A_FAMILY)
def test_a_step_runs_on_a_gpu_in_half_precision_without_a_wait(found, generation):
    assert len(found[generation]) == 4
    check(generation, found[generation])


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_way_of_training_runs_on_a_gpu_without_a_wait(device, tmp_path, generation):
    cases = steps(device, tmp_path, {"all": {"generation": generation}})["all"]
    assert len(cases) == 20
    if generation == "v4_7_moe":
        # Without values torch knows the grouped product of experts in bf16 alone (2.13).
        cases = [
            case
            for case in cases
            if case["precision"] == "bf16" or (case["precision"], case["method"]) == ("bf16 autocast", "lora")
        ]
    check(generation, cases)


@pytest.mark.parametrize("capability", CARDS)
def test_every_card_gets_attention_that_it_has(found, capability):
    cases = found["capability {}.{}".format(*capability)]
    assert not errors(cases)
    assert [case["precision"] for case in cases] == (
        ["fp16"] if capability < (8, 0) else ["bf16 autocast", "fp16"]
    )
    for case in cases:
        assert set(case["attention"]) == ({"sdpa"} if capability < (8, 0) else {"varlen"}), case


def test_flash_attention_2_is_told_where_samples_end(found):
    """Told nothing, transformers looks for the ends on the device, three times a layer, and the program waits."""
    assert not errors(found["flash"])
    assert len(found["flash"]) == 2
    for case in found["flash"]:
        assert case["waits"] == [], case
        assert case["attention"]["flash"] == 2, case  # layers


def test_what_would_fail_on_a_gpu_fails_here(found):
    assert found["itself"] == [
        {
            "reading a value": "DataDependentOutputException",
            "a shape that depends on values": "DynamicOutputShapeException",
            "two devices": "FakeTensorDeviceMismatchError",
            "two dtypes": "TypeError",
            "copies": ["aten._to_copy.default"] * 2,  # back, and there with blocking
        }
    ]

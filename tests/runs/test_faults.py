"""Faults in running runs: an error shown once and first, processes that hang or are killed, NaN, memory."""

import json
import math
import re
import time

import pytest
from safetensors.torch import load_file

from support import finetune_runs, live_runs
from support.live_runs import STAGES, LiveRun

ALL_END_WITHIN = 30  # seconds after a process failed


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    return live_runs.tiny(folder / "model"), finetune_runs.write_data(folder / "data")


def start(small, output, faults, *flags, processes=2, **kwargs):
    model, data = small
    flags = live_runs.flags(model, data, output, "--save_strategy", "no", *flags, **kwargs)
    return LiveRun(flags, processes=processes, faults=faults)


def lines_about(printed, text):
    return [line for line in printed.splitlines() if text in line]


def test_a_step_that_is_not_finite_is_left_out_and_the_error_of_one_rank_ends_all(small, tmp_path):
    faults = {"nan": [1, 2, 2], "raise": [1, 4]}
    run = start(small, tmp_path / "out", faults, steps=6)
    run.wait_for_step(3)
    since = time.monotonic()
    code, printed = run.end()
    assert code == 1
    assert time.monotonic() - since < ALL_END_WITHIN
    said = lines_about(printed, "step 2: the loss is nan for row")
    assert len(said) == 1
    assert "(process 1). The step was not applied (1 in a row)." in said[0]
    # The error that was planted: once, with its traceback, before anything that follows from it.
    assert printed.count("planted error") == 2  # the line of source, and the message
    assert printed.count("Traceback") == 1
    assert "process 1 on " in printed[: printed.index("Traceback")]
    assert "Connection" not in printed
    other = (tmp_path / "out" / "logs" / "rank0.log").read_text()
    assert "process 1 on" in other
    assert "'planted error'" in other
    assert "KeyError" in (tmp_path / "out" / "logs" / "rank1.log").read_text()


def test_a_mistake_found_by_one_rank_alone_is_one_message(small, tmp_path):
    code, printed = start(small, tmp_path / "out", {"bad_row": [1, 2]}).end()
    assert code == 1
    assert len(lines_about(printed, "error: row 5: planted mistake")) == 1
    assert "Traceback" not in printed


def test_a_rank_that_hangs_is_named_after_the_time_limit(small, tmp_path):
    run = start(small, tmp_path / "out", {"hang": [1, 2]}, "--ddp_timeout", 5)
    run.wait_for_step(1)
    since = time.monotonic()
    code, printed = run.end()
    assert code == 1
    assert time.monotonic() - since < 5 + ALL_END_WITHIN
    said = lines_about(printed, "waited")
    assert len(said) == 1
    assert "for 1 of 2 processes (--ddp_timeout 5). process 1 on" in said[0]
    assert "is still at: loading the rows of step 2" in said[0]
    assert "in get_batch_samples" in (tmp_path / "out" / "logs" / "rank1.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_rank_is_named(small, tmp_path, stage):
    code, printed = start(small, tmp_path / "out", {"kill": [1, 2]}, *STAGES[stage]).end()
    assert code == 1
    said = lines_about(printed, "ended without an error of its own")
    assert len(said) == 1
    assert "error: process 1 (id " in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_three_steps_in_a_row_end_the_run_on_all_ranks(small, tmp_path, stage):
    code, printed = start(small, tmp_path / "out", {"nan": [0, 2, 9]}, *STAGES[stage], steps=8).end()
    assert code == 1
    said = lines_about(printed, "error: step 4: the loss is nan for row")
    assert len(said) == 1
    assert "The weights are still those of step 1" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_skipped_steps_are_left_out_of_means_and_the_schedule_waits(small, tmp_path, stage):
    flags = ("--on_nonfinite", "skip", "--logging_steps", 2, *STAGES[stage])
    assert start(small, tmp_path / "out", {"nan": [1, 2, 5]}, *flags, steps=8).end()[0] == 0
    log = finetune_runs.losses(tmp_path / "out")
    assert [line.get("skipped_steps", 0) for line in log] == [1, 2, 1, 0]
    assert [math.isnan(line["loss"]) for line in log] == [False, True, False, False]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"][-1]
    expected = (log[0]["loss"] + log[2]["loss"] + 2 * log[3]["loss"]) / 4
    assert state["train_loss"] == pytest.approx(expected, rel=1e-4)
    assert log[1]["learning_rate"] == log[0]["learning_rate"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_not_applied_changes_no_weight(small, tmp_path, stage):
    flags = ("--save_strategy", "steps", "--save_steps", 1, *STAGES[stage])
    assert start(small, tmp_path / "out", {"nan": [1, 2, 2]}, *flags, steps=2).end()[0] == 0
    before = load_file(tmp_path / "out" / "checkpoint-1" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key]) for key in before)


def test_memory_that_runs_out_is_told_with_the_batch_and_what_would_help(small, tmp_path):
    code, printed = start(small, tmp_path / "out", {"memory": [0, 1]}, processes=0, batch=2).end()
    assert code == 1
    assert "Traceback" not in printed
    message = printed[printed.index("error: Out of memory") :]
    assert "you tried to allocate 4000000000000000 bytes" in message
    assert re.search(r"Peak so far: [01]\.", message)  # GiB, of a process that has the libraries loaded
    assert "The batch has 2 x " in message
    assert "image slices of" in message
    assert "1. --activation_checkpointing true" in message
    assert "2. --per_device_train_batch_size 1 --gradient_accumulation_steps 2" in message
    assert "3. --use_lora true --tune_llm false" in message
    assert "\n  4." not in message


@pytest.mark.slow
@pytest.mark.parametrize(("where", "batch"), [("loading", False), ("evaluating", True)])
def test_memory_that_runs_out_elsewhere_is_told_too(small, tmp_path, where, batch):
    flags = ("--eval_data_path", small[1], "--eval_strategy", "steps", "--eval_steps", 1)
    code, printed = start(small, tmp_path / "out", {"memory_in": where}, *flags).end()
    assert code == 1
    assert "Traceback" not in printed
    assert len(lines_about(printed, "error: Out of memory")) == 1
    assert ("The batch has 8 x " in printed) == batch
    assert "\n  3. " in printed

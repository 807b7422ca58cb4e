"""Flags of transformers' Trainer that this project passes on do what they say, in real runs."""

import json

import pytest

from make_checkpoint import make_checkpoint
from support import finetune_runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flags")
    data = finetune_runs.write_data(folder / "data")
    return {"model": make_checkpoint(folder / "model", "v2_6", size="tiny"), "data": data, "launcher": False}


@pytest.fixture(scope="module")
def plain(place, tmp_path_factory):
    """The losses of a run without further flags."""
    return finetune_runs.train(tmp_path_factory.mktemp("plain"), **place)


def history(folder):
    return json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]


def test_the_plateau_schedule_follows_the_evaluations(place, tmp_path):
    options = {"patience": 0, "factor": 0.1, "threshold": 9.0, "threshold_mode": "abs"}
    lines = finetune_runs.train(
        tmp_path, "--eval_strategy", "steps", "--eval_steps", 1, "--eval_data_path", place["data"],
        "--lr_scheduler_type", "reduce_lr_on_plateau", "--lr_scheduler_kwargs", json.dumps(options), **place,
    )  # fmt: skip
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3, 1e-3, 1e-4])


def test_noise_reaches_the_embeddings(place, plain, tmp_path):
    noisy = finetune_runs.train(tmp_path, "--neftune_noise_alpha", 5, **place)
    assert noisy[0]["loss"] != plain[0]["loss"]


def test_the_optimizers_options_reach_it(place, plain, tmp_path):
    fast = finetune_runs.train(tmp_path / "a", "--optim", "sgd", "--optim_args", "momentum=0.9", **place)
    slow = finetune_runs.train(tmp_path / "b", "--optim", "sgd", **place)
    assert fast[0]["loss"] == slow[0]["loss"] == plain[0]["loss"]
    assert fast[2]["loss"] != slow[2]["loss"]


def test_what_is_counted_and_measured_is_logged(place, plain, tmp_path):
    flags = (
        "--include_num_input_tokens_seen",
        "all",
        "--skip_memory_metrics",
        "false",
        "--full_determinism",
        "true",
    )
    lines = finetune_runs.train(tmp_path, *flags, "--dataloader_num_workers", 1, "--dataloader_prefetch_factor", 3,
                                "--dataloader_multiprocessing_context", "spawn", **place)  # fmt: skip
    assert lines[-1]["num_input_tokens_seen"] > lines[0]["num_input_tokens_seen"] > 0
    assert "train_mem_cpu_peaked_delta" in history(tmp_path)[-1]
    assert [line["loss"] for line in lines] == [line["loss"] for line in plain]


def test_the_best_checkpoint_is_kept_and_loaded(place, tmp_path):
    finetune_runs.train(
        tmp_path, "--eval_strategy", "steps", "--eval_steps", 1, "--eval_data_path", place["data"], "--eval_on_start",
        "--save_strategy", "best", "--save_total_limit", 1, "--load_best_model_at_end", "true", **place,
    )  # fmt: skip
    evaluations = [line for line in history(tmp_path) if "eval_loss" in line]
    best = min(evaluations[1:], key=lambda line: line["eval_loss"])
    assert evaluations[0]["step"] == 0
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == [f"checkpoint-{best['step']}"]

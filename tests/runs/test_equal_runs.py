"""Runs that must give the same losses and gradient norms, however the work is split."""

import json
import math

import pytest
from safetensors.torch import load_file

from support import finetune_runs
from support.golden_models import ZERO_GRADIENTS, golden_model
from support.paths import GOLDENS

# Relative differences; worst values measured (torch 2.13, CPU, gloo) behind each.
LOSS_TOLERANCE = 2e-5  # 1.6e-6 of 5.9 (ZeRO-3, third step)
NORM_TOLERANCE = 1e-4  # 1.1e-5
WEIGHT_TOLERANCE = 6e-4  # 2.7e-4 (ZeRO-3), after three AdamW steps of 1e-3, which amplify rounding
LORA = ("--use_lora", "true", "--tune_llm", "false", "--lora_dropout", 0, "--lora_r", 8)
STAGES = {
    "ddp": (),
    "zero2": ("--deepspeed", "ds_config_zero2.json"),
    "zero3": ("--deepspeed", "ds_config_zero3.json"),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A V-2.6 checkpoint and eight rows: a text-only one, a sliced one, uneven answers."""
    folder = tmp_path_factory.mktemp("small")
    model, _ = golden_model("v2_6", attention="sdpa")
    model.config.name_or_path = str(GOLDENS / "v2_6" / "tokenizer")
    model.save_pretrained(folder / "model")
    return {"model": folder / "model", "data": finetune_runs.write_data(folder / "data"), "folder": folder}


@pytest.fixture(scope="module")
def reference(small):
    """The undivided runs: one process, one micro-batch of four, no DeepSpeed."""
    found = {}
    for name, flags in {"full": (), "lora": LORA}.items():
        folder = small["folder"] / f"reference_{name}"
        folder.mkdir()
        logs = finetune_runs.train(folder, *flags, model=small["model"], data=small["data"], launcher=False)
        found[name] = (logs, folder / "out")
    return found


def assert_same(found, expected):
    assert len(found) == len(expected)
    for line, wanted in zip(found, expected, strict=True):
        assert line["loss"] == pytest.approx(wanted["loss"], rel=LOSS_TOLERANCE)
        assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=NORM_TOLERANCE)


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 2), (1, 4)])
def test_batch_times_accumulation_does_not_change_the_run(small, reference, tmp_path, batch, accumulation):
    found = finetune_runs.train(
        tmp_path,
        model=small["model"],
        data=small["data"],
        batch=batch,
        accumulation=accumulation,
        launcher=False,
    )
    assert_same(found, reference["full"][0])


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_give_the_run_of_one(small, reference, tmp_path, stage, kind):
    flags = (*STAGES[stage], *(LORA if kind == "lora" else ()))
    found = finetune_runs.train(
        tmp_path, *flags, model=small["model"], data=small["data"], processes=2, batch=1, accumulation=2
    )
    logs, output = reference[kind]
    assert_same(found, logs)
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    weights, wanted = load_file(tmp_path / "out" / name), load_file(output / name)
    assert weights.keys() == wanted.keys()
    # Without gradients but for rounding, AdamW moves a key's bias by the sign of the noise.
    compared = [key for key in wanted if not key.endswith(ZERO_GRADIENTS)]
    worst = max((weights[key].float() - wanted[key].float()).abs().max().item() for key in compared)
    print(f"\n{stage} {kind}: worst weight difference {worst:.1e}")
    assert worst < WEIGHT_TOLERANCE


def test_checkpointing_does_not_change_the_run(small, reference, tmp_path):
    found = finetune_runs.train(
        tmp_path, "--gradient_checkpointing", "true", model=small["model"], data=small["data"], launcher=False
    )
    assert_same(found, reference["full"][0])


def test_the_asked_for_cosine_is_what_runs(small, tmp_path):
    found = finetune_runs.train(
        tmp_path, "--lr_scheduler_type", "cosine", "--warmup_steps", 0,
        *STAGES["zero2"], model=small["model"], data=small["data"], steps=4, batch=1,
    )  # fmt: skip
    rates = [line["learning_rate"] for line in found]
    # The rate with which a step was made, of four steps.
    expected = [0.5 * 1e-3 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert rates == pytest.approx(expected, abs=1e-9)


def test_every_row_counts_once_when_the_last_step_is_uneven(small, tmp_path):
    rows = json.loads(small["data"].read_text())[:3]
    data = small["data"].parent / "three.json"
    data.write_text(json.dumps(rows))
    one = finetune_runs.train(
        tmp_path / "one", model=small["model"], data=data, batch=4, steps=2, launcher=False
    )
    two = finetune_runs.train(
        tmp_path / "two", model=small["model"], data=data, batch=2, steps=2, processes=2
    )
    assert_same(two, one)


@pytest.mark.slow
def test_weights_of_messages_give_one_run_however_it_is_divided(small, reference, tmp_path):
    rows = json.loads(small["data"].read_text())
    for number, row in enumerate(rows):
        if number % 3:  # a third of the rows has none
            row["conversations"][1]["weight"] = (0.05, 0.5, 2, 0.3)[number % 4]
    data = small["data"].parent / "weighted.json"
    data.write_text(json.dumps(rows))
    one = finetune_runs.train(tmp_path / "one", model=small["model"], data=data, launcher=False)
    assert [line["loss"] for line in one] != [line["loss"] for line in reference["full"][0]]
    halves = finetune_runs.train(
        tmp_path / "halves", model=small["model"], data=data, batch=2, accumulation=2, launcher=False
    )
    assert_same(halves, one)
    for stage in ("ddp", "zero3"):
        two = finetune_runs.train(
            tmp_path / stage, *STAGES[stage],
            model=small["model"], data=data, batch=1, accumulation=2, processes=2,
        )  # fmt: skip
        assert_same(two, one)


@pytest.mark.slow
def test_one_weight_for_all_messages_changes_nothing(small, reference, tmp_path):
    rows = json.loads(small["data"].read_text())
    for row in rows:
        row["conversations"][1]["weight"] = 0.01
    data = small["data"].parent / "alike.json"
    data.write_text(json.dumps(rows))
    found = finetune_runs.train(tmp_path, model=small["model"], data=data, launcher=False)
    assert_same(found, reference["full"][0])

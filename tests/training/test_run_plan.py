"""What a run says before weights are loaded: its length, and what can hardly be meant."""

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest

from minicpm_tune.errors import UserError
from minicpm_tune.models.parameter_parts import PartCount
from minicpm_tune.settings.argument_groups import LearningRates
from minicpm_tune.settings.arguments import TrainingArguments
from minicpm_tune.training.run_plan import check_rates, plan_lines, plan_run, warnings


def training(tmp_path, **values):
    defaults = {"max_steps": 100, "per_device_train_batch_size": 2, "save_steps": 50, "learning_rate": 1e-5}
    return TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, **(defaults | values))


def plan(arguments, samples=100, left_out=0):
    """The plan for so many rows of 500 tokens."""
    order = list(range(samples))
    mixture = SimpleNamespace(samples=samples, epoch_order=lambda **_: order)
    lengths = np.full(samples, 500)
    return plan_run(
        arguments, SimpleNamespace(mixture=mixture, lengths=lengths, left_out=set(range(left_out)))
    )


@pytest.mark.parametrize(
    ("values", "steps_per_epoch", "steps"),
    [
        ({}, 50, 100),
        ({"gradient_accumulation_steps": 3}, 17, 100),
        ({"max_steps": -1, "num_train_epochs": 1.5}, 50, 75),
        ({"packing": True, "model_max_length": 1000}, 25, 100),
    ],
)
def test_steps_are_counted_as_the_trainer_counts_them(values, steps_per_epoch, steps, tmp_path):
    found = plan(training(tmp_path, **values))
    assert (found.steps_per_epoch, found.steps) == (steps_per_epoch, steps)


def test_everything_a_newcomer_wants_to_know_is_said(tmp_path):
    arguments = training(tmp_path, eval_strategy="steps", eval_steps=0.1)
    text = "\n".join(plan_lines(plan(arguments, left_out=3), arguments))
    assert "Data: 100 samples an epoch, 50,000 tokens (3 rows can't be used and are left out)." in text
    assert "Run: 100 steps = 2 epochs at learning rate 1e-05; first evaluation after step 10" in text
    assert "first checkpoint after step 50." in text
    assert f"Everything is written to {tmp_path / 'out'}." in text
    assert not warnings(plan(arguments), arguments)


def test_what_never_comes_is_not_promised(tmp_path):
    arguments = training(tmp_path, save_strategy="no")
    assert "no evaluation, no checkpoint before the end." in plan_lines(plan(arguments), arguments)[1]
    arguments = training(tmp_path, save_strategy="epoch")
    assert "first checkpoint after step 50." in plan_lines(plan(arguments), arguments)[1]


def test_the_first_command_on_thirty_rows_is_warned_about(tmp_path):
    arguments = training(tmp_path, max_steps=10_000, per_device_train_batch_size=1, save_steps=1000)
    [text] = warnings(plan(arguments, samples=30), arguments)
    assert re.match(r"10,000 steps see each of the 30 samples 333 times\. .* EPOCHS=3", text)


def test_a_checkpoint_or_evaluation_that_never_comes_is_warned_about(tmp_path):
    arguments = training(tmp_path, save_steps=1000, eval_strategy="steps", eval_steps=101)
    save, evaluate = warnings(plan(arguments), arguments)
    assert "The first checkpoint would come after 1,000 steps, but the run ends after 100" in save
    assert "The first evaluation would come after 101 steps" in evaluate
    assert not warnings(dataclasses.replace(plan(arguments), steps=1000), arguments)


@pytest.mark.parametrize(("part", "flag"), [("vision", "--vision_lr"), ("embeddings", "--embed_lr")])
def test_a_rate_for_a_part_that_does_not_train_is_refused(part, flag):
    counts = {"vision": PartCount(5, 0, ("float32",)), "llm": PartCount(5, 5, ("float32",))}
    check_rates(LearningRates(1e-4, {"llm": 1e-5, "vision": None}), counts)
    with pytest.raises(UserError, match=f"{flag} is given, but nothing of that part trains"):
        check_rates(LearningRates(1e-4, {part: 1e-5}), counts)

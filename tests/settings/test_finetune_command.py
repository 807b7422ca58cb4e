"""The help page, and a command line that is checked before anything heavy is imported."""

import dataclasses
import os
import re
import sys

import pytest

from minicpm_tune.settings.argument_groups import RunOptions, TuningOptions
from minicpm_tune.settings.arguments import DataArguments, LoraArguments, ModelArguments, TrainingArguments
from minicpm_tune.settings.finetune_command import answer_or_check, render_help
from support import processes
from support.paths import FINETUNE


def test_help_shows_every_argument_of_ours_and_needs_no_torch():
    code = (
        "import sys\n"
        "from minicpm_tune.settings.finetune_command import render_help\n"
        "page = render_help()\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "sys.stdout.write(page)"
    )
    done = processes.run([sys.executable, "-c", code], cwd=FINETUNE, limit=60)
    assert done.returncode == 0, done.stderr
    page = done.stdout
    groups = (ModelArguments, DataArguments, TuningOptions, LoraArguments, RunOptions)
    ours = {item.name for group in groups for item in dataclasses.fields(group)}
    assert set(re.findall(r"^  --(\w+)$", page, flags=re.MULTILINE)) == ours


def test_the_long_help_shows_every_argument_there_is():
    page = render_help(everything=True)
    shown = set(re.findall(r"^  --(\w+)$", page, flags=re.MULTILINE))
    fields = {
        item.name
        for group in (ModelArguments, DataArguments, TrainingArguments, LoraArguments)
        for item in dataclasses.fields(group)
        if item.init
    }
    assert fields - shown == {"local_rank", "gradient_checkpointing", "gradient_checkpointing_kwargs"}
    assert shown <= fields
    assert "Not supported: the loss never builds all logits." in page


@pytest.mark.parametrize(
    ("word", "expected"),
    [("--help", "--lora_target_modules"), ("--help-all", "--adam_beta2"), ("--version", "minicpm_tune 0.")],
)
def test_a_question_is_answered_and_exits_well(word, expected, capsys):
    with pytest.raises(SystemExit) as caught:
        answer_or_check(["--seed", "1", word])
    assert caught.value.code == 0
    assert expected in capsys.readouterr().out


def test_a_wrong_command_line_ends_before_anything_heavy_is_imported(place, capsys):
    words = ["--model_name_or_path", "model", "--data_path", "rows.json"]
    answer_or_check(words)
    with pytest.raises(SystemExit) as caught:
        answer_or_check([*words, "--lerning_rate", "1"])
    assert caught.value.code == 1
    assert "Did you mean --learning_rate?" in capsys.readouterr().err
    code = (
        "import sys\n"
        "from minicpm_tune.settings.finetune_command import answer_or_check\n"
        "try:\n    answer_or_check(sys.argv[1:])\n"
        "finally:\n    assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(FINETUNE)}
    wrong = ("--deepspeed", "no.json", "--lora_r", "0")
    done = processes.run([sys.executable, "-c", code, *words, *wrong], env=env, limit=60)
    assert done.returncode == 1
    assert "2 problems with the command line" in done.stderr
    assert "AssertionError" not in done.stderr


@pytest.mark.parametrize("group", [ModelArguments, DataArguments, TuningOptions, RunOptions, LoraArguments])
def test_each_argument_of_ours_has_a_help_text(group):
    for item in dataclasses.fields(group):
        assert len(item.metadata["help"]) > 20, item.name

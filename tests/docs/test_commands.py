"""Every command of the documentation: its program exists, and takes the flags and variables that it is given."""

import importlib
import re

import pytest
from transformers import HfArgumentParser

from minicpm_tune.settings.argument_groups import LoraArguments, ModelArguments
from minicpm_tune.settings.arguments import DataArguments, TrainingArguments
from minicpm_tune.settings.legacy_flags import translate
from support.launcher_stage import Stage
from support.pages import PAGES, commands
from support.paths import FINETUNE, ROOT

COMMANDS = [command for page in PAGES for command in commands(page)]
COMING = {"EPOCHS", "LEARNING_RATE", "SAVE_STEPS", "EVAL_STEPS", "FSDP"}
LAUNCHERS = ("finetune_lora.sh", "finetune_ds.sh", "finetune.sh")


def named(command, *endings):
    """Where a command's words name a program of this project."""
    return next((at for at, word in enumerate(command.words) if word.rpartition("/")[2] in endings), None)


def of(*endings):
    found = [
        command for command in COMMANDS if named(command, *endings) is not None and command.words[0] != "srun"
    ]
    assert found
    return pytest.mark.parametrize("command", found, ids=str)


def launcher_variables():
    """What the launchers read from the environment."""
    text = "".join((FINETUNE / name).read_text() for name in (*LAUNCHERS, "launcher.sh"))
    return set(re.findall(r"\$\{(\w+):?[-+]", text))


@of(*LAUNCHERS)
def test_launchers_know_the_variables_and_the_program_takes_the_flags(command, tmp_path):
    if COMING & set(command.variables) - launcher_variables():
        pytest.xfail("the launchers do not have these variables yet")
    assert set(command.variables) <= launcher_variables()
    at = named(command, *LAUNCHERS)
    assert command.words[at - 1] == "bash"
    variables = {name: value.replace("...", "x") for name, value in command.variables.items()}
    name = command.words[at].rpartition("/")[2]
    done, call = Stage(tmp_path).start(name, *command.words[at + 1 :], **variables)
    assert done.returncode == 0, done.stderr
    parse_training(call.argv)


@of("finetune.py")
def test_finetune_takes_its_flags(command):
    parse_training(command.words[named(command, "finetune.py") + 1 :])


def parse_training(words):
    if "--help" in words:
        return
    groups = (ModelArguments, DataArguments, TrainingArguments, LoraArguments)
    parser = HfArgumentParser(groups, allow_abbrev=False, exit_on_error=False)
    _, unknown = parser.parse_known_args(translate(list(words)).argv)
    assert unknown == []


SMALL = ("chat.py", "predict.py", "merge_lora.py", "quantize.py", "inspect_data.py", "plan_memory.py")


@of(*SMALL)
def test_commands_take_their_flags(command):
    at = named(command, *SMALL)
    words = command.words[at + 1 :]
    if "--help" not in words:
        importlib.import_module(command.words[at].rpartition("/")[2].removesuffix(".py")).parse_flags(
            list(words)
        )


def test_paths_in_commands_exist():
    missing = []
    for command in COMMANDS:
        folder = FINETUNE if command.page == "finetune/readme.md" else ROOT
        paths = re.findall(r"(?:finetune|tests|benchmarks|demo)/[\w/.]+|\b\w+\.sh\b", " ".join(command.words))
        missing += [f"{path} ({command})" for path in paths if not (folder / path).exists()]
    assert missing == []

"""Every command of the documentation: its program exists, and takes the flags and variables that it is given."""

import importlib
import re
from itertools import pairwise
from pathlib import Path

import pytest

from minicpm_tune.settings.finetune_command import read_command_line
from support.launcher_stage import Stage
from support.pages import PAGES, commands
from support.paths import FINETUNE, ROOT

COMMANDS = [command for page in PAGES for command in commands(page)]
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
def test_launchers_know_the_variables_and_the_program_takes_the_flags(command, tmp_path, monkeypatch):
    assert set(command.variables) <= launcher_variables()
    at = named(command, *LAUNCHERS)
    assert command.words[at - 1] == "bash"
    given = {"MODEL": "./model", "DATA": "train.json"}  # where the page has dots
    variables = {name: given[name] if value == "..." else value for name, value in command.variables.items()}
    name = command.words[at].rpartition("/")[2]
    done, call = Stage(tmp_path).start(name, *command.words[at + 1 :], **variables)
    assert done.returncode == 0, done.stderr
    takes(call.argv, tmp_path, monkeypatch)


@of("finetune.py")
def test_finetune_takes_its_flags(command, tmp_path, monkeypatch):
    words = list(command.words[named(command, "finetune.py") + 1 :])
    if not {"--help", "--help-all", "--version"} & set(words):
        takes(words, tmp_path, monkeypatch)


def takes(words, folder, monkeypatch):
    """Have the command line checked in a folder in which what it names is there."""
    monkeypatch.chdir(folder)
    for flag, value in pairwise(words):
        path = Path(value)
        if flag == "--model_name_or_path" and not re.fullmatch(r"[\w-]+/[\w.-]+", value):
            path.mkdir(parents=True)
            (path / "config.json").write_text("{}")
        if flag in ("--data_path", "--eval_data_path"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("rows.json 1" if path.suffix == ".txt" else "[]")
        if flag == "--new_tokens":
            path.write_text("<cat>")
    Path("rows.json").write_text("[]")
    read_command_line(list(words))


SMALL = (
    "chat.py",
    "predict.py",
    "merge_lora.py",
    "quantize.py",
    "inspect_data.py",
    "plan_memory.py",
    "convert_data.py",
)


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

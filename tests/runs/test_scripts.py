"""The scripts of the repository, under every shell: they can be read, and the tests' own acts."""

import os
import shlex
import shutil

import pytest

from support import processes
from support.paths import ROOT

SHELLS = [shell for shell in ("dash", "bash", "sh", "busybox sh") if shutil.which(shell.split()[0])]


SCRIPTS = (
    "run_tests.sh",
    "setup_environment.sh",
    ".ci/run",
    "finetune/finetune_lora.sh",
    "finetune/finetune_ds.sh",
    "finetune/finetune.sh",
    "finetune/launcher.sh",
)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("shell", SHELLS)
def test_every_script_is_readable_by_every_shell(script, shell):
    done = processes.run([*shell.split(), "-n", ROOT / script], limit=20)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def own_copy(tmp_path):
    """The set-up scripts in a folder of their own, with a python that only records its calls."""
    root = tmp_path / "a copy"
    for name in ("finetune", "tests", ".ci"):
        (root / name).mkdir(parents=True)
    requirements = ("finetune/requirements.txt", "tests/requirements.txt")
    for name in ("run_tests.sh", "setup_environment.sh", ".ci/run", *requirements):
        shutil.copy(ROOT / name, root / name)
    log = root / "calls"
    quoted = shlex.quote(str(log))
    python = root / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    line = f'printf "%s|" "$HF_HUB_OFFLINE" "$@" >>{quoted}; echo >>{quoted}'
    for name in ("python", "ruff", "mypy", "lint-imports"):
        program = python.with_name(name)
        program.write_text(f"#!/bin/sh\n{line}\n")
        program.chmod(0o755)
    return root, log


def run_tests(root, *words, shell="bash", script="run_tests.sh"):
    env = {**os.environ, "VENV": str(root / "venv")}
    env.pop("HF_HUB_OFFLINE", None)
    done = processes.run([*shell.split(), root / script, *words], env=env, limit=60, cwd="/")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_the_test_command_installs_once_and_passes_arguments_on(shell, own_copy):
    root, log = own_copy
    run_tests(root, "-k", "two words", shell=shell)
    first = log.read_text().splitlines()
    assert [line.split("|")[1:4] for line in first] == [
        ["-m", "pip", "install"],
        ["-m", "pip", "install"],
        ["-m", "pytest", "-m"],
    ]
    assert first[2] == "1|-m|pytest|-m|not slow|-n|2|-k|two words|"
    log.unlink()
    run_tests(root, "--all", "-s", shell=shell)
    assert log.read_text() == "1|-m|pytest|-m||-s|\n"
    log.unlink()
    with (root / "tests" / "requirements.txt").open("a") as file:
        file.write("another==1\n")
    run_tests(root, shell=shell, script=".ci/run")
    called = [line.split("|")[1:3] for line in log.read_text().splitlines()]
    assert called[:3] == [["-m", "pip"], ["format", "--check"], ["check", "."]]
    assert called[-1] == ["-m", "pytest"]

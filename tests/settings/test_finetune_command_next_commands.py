"""The commands that a run prints at its end work as they stand."""

import shlex

import pytest

from minicpm_tune.settings.finetune_command import VARIABLES, command_to_continue, commands_after
from support.launcher_stage import Stage
from support.paths import FINETUNE


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher and no torchrun around this process."""
    torchrun = ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    for name in (*torchrun, *VARIABLES, "LAUNCHER", "LAUNCHER_FLAGS"):
        monkeypatch.delenv(name, raising=False)


def test_the_command_that_continues_leaves_out_what_contradicts_it(monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    words = [
        "--data_path",
        "it's.json",
        "--overwrite_output_dir",
        "--seed",
        "1",
        "--resume_from_checkpoint=x",
    ]
    command = command_to_continue(words, script="finetune.py")
    assert (
        command == "python finetune.py --data_path 'it'\"'\"'s.json' --seed 1 --resume_from_checkpoint true"
    )
    for name, value in {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    for name, value in {
        "GROUP_WORLD_SIZE": "2",
        "GROUP_RANK": "1",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    start = "torchrun --nproc_per_node 2 --nnodes 2 --node_rank 1 --master_addr a --master_port 1 finetune.py"
    assert command_to_continue([], script="finetune.py") == f"{start} --resume_from_checkpoint true"


@pytest.mark.parametrize("launcher", ["finetune_lora.sh", "finetune.sh"])
@pytest.mark.parametrize("restarts", [{}, {"MAX_RESTARTS": "2"}], ids=["once", "restarts"])
def test_a_launchers_run_is_continued_by_the_launcher(launcher, restarts, tmp_path, monkeypatch):
    stage = Stage(tmp_path)
    chosen = {"MODEL": "my model", "DATA": "d.json", "MAX_STEPS": "7", "DEEPSPEED": "", **restarts}
    flags = ["--lora_r", "4"] if restarts else ["--lora_r", "4", "--overwrite_output_dir", "true"]
    _, call = stage.start(launcher, *flags, **chosen)
    for name in ("LAUNCHER", "LAUNCHER_FLAGS", *chosen):
        monkeypatch.setenv(name, call.env[name])
    monkeypatch.chdir(tmp_path)
    command = command_to_continue(call.argv, script="finetune.py")
    words = shlex.split(command)
    values = dict(word.split("=", 1) for word in words[: words.index("bash")])
    assert values == chosen
    assert words[words.index("bash") :] == [
        "bash", str(FINETUNE / launcher), "--lora_r", "4", "--resume_from_checkpoint", "true",
    ]  # fmt: skip
    _, again = stage.start(launcher, *words[words.index("bash") + 2 :], **values)
    assert again.value("--resume_from_checkpoint") == "true"
    assert (again.value("--model_name_or_path"), again.value("--lora_r")) == ("my model", "4")
    assert "--overwrite_output_dir" not in again.argv


def test_addresses_are_part_of_the_command_on_several_machines_alone(monkeypatch):
    for name, value in {
        "LAUNCHER": "/x/finetune_ds.sh",
        "LAUNCHER_FLAGS": "0",
        "MASTER_ADDR": "10.0.0.7",
    }.items():
        monkeypatch.setenv(name, value)
    assert (
        command_to_continue(["--seed", "1"], script="f")
        == "bash /x/finetune_ds.sh --resume_from_checkpoint true"
    )
    monkeypatch.setenv("NNODES", "2")
    assert command_to_continue([], script="f").startswith("NNODES=2 MASTER_ADDR=10.0.0.7 bash ")


def test_a_finished_run_names_what_fits_its_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = str(tmp_path / "finetune" / "finetune.py")
    lora = commands_after("out put/lora", adapter=True, script=script)
    assert lora[0] == "python finetune/merge_lora.py --adapter 'out put/lora' --output_dir 'out put/merged'"
    full = commands_after("out", adapter=False, script=script)
    assert [command.split()[1:4] for command in full] == [
        ["finetune/chat.py", "--model_name_or_path", "out"],
        ["finetune/predict.py", "--model_name_or_path", "out"],
    ]

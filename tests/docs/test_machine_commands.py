"""The commands of docs/several-machines.md, as they stand there, with a recorded torchrun."""

import os
import sys

import pytest

from support import finetune_runs, live_runs, processes
from support.launcher_stage import Stage
from support.live_runs import LOSS_TOLERANCE, NORM_TOLERANCE, LiveRun
from support.pages import indented
from support.paths import ROOT

MACHINES = 4  # of the SLURM command


def written():
    """The commands of the page, by the beginning of the comment above each."""
    found = {}
    for block in indented(ROOT / "docs" / "several-machines.md"):
        comment, _, command = block.partition("\n")
        if comment.startswith("# "):
            found[comment[2:].split(":")[0]] = command
    return found


@pytest.fixture
def stage(tmp_path):
    found = Stage(tmp_path)
    found.program(
        "srun", "import os, subprocess, sys",
        "words = sys.argv[sys.argv.index('bash'):]",
        "count = int(sys.argv[sys.argv.index('--nodes') + 1])",
        "job = {'SLURM_NNODES': str(count), 'SLURM_JOB_ID': '123456', 'SLURM_NODEID': str(count - 1)}",
        "sys.exit(subprocess.run(words, env={**os.environ, **job}).returncode)",
    )  # fmt: skip
    found.program("scontrol", "print('node07'); print('node08')")
    return found


def run_as_written(stage, command):
    """Run a command from the repository's folder; give the recorded call."""
    command = command.replace("MODEL=... DATA=...", "MODEL=m DATA=d").replace("DATA=...", "DATA=d")
    assert "..." not in command
    env = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "DS_ACCELERATOR")
    }
    variables = {**env, "PATH": f"{stage.bin}:{env['PATH']}"}
    done = processes.run(["bash", "-c", command], env=variables, cwd=ROOT, limit=120)
    assert done.returncode == 0, done.stderr
    return stage.call()


def test_two_machines(stage):
    call = run_as_written(stage, written()["two machines"])
    assert [call.value(f"--{name}") for name in ("nnodes", "node_rank", "master_addr")] == [
        "2",
        "0",
        "10.0.0.1",
    ]


def test_machines_that_meet_at_an_address(stage):
    call = run_as_written(stage, written()["or without numbering them"])
    assert [call.value(f"--rdzv_{name}") for name in ("backend", "endpoint")] == ["c10d", "10.0.0.1:29400"]
    assert call.value("--nnodes") == "2"


def test_slurm(stage):
    call = run_as_written(stage, written()["SLURM"])
    values = [call.value(f"--{name}") for name in ("nnodes", "node_rank", "master_addr", "master_port")]
    assert values == [str(MACHINES), str(MACHINES - 1), "node07", "23456"]


def test_the_recipe_for_three_rtx_3090(stage):
    call = run_as_written(stage, written()["MiniCPM-V 2.0 on three RTX 3090"])
    flags = ("--nproc_per_node", "--deepspeed", "--model_name_or_path", "--tune_llm")
    assert [call.value(flag) for flag in flags] == [
        "3",
        "ds_config_zero2_offload.json",
        "openbmb/MiniCPM-V-2",
        "true",
    ]


@pytest.mark.slow
def test_the_recipe_trains_and_continues_as_one_process_would(tmp_path):
    """V-2, three processes, ZeRO-2 with the optimizer in the CPU's memory, through the launcher."""
    model, data = live_runs.tiny(tmp_path / "model", "v2"), live_runs.uneven_rows(tmp_path / "data", count=8)

    def launch(output, *flags, batch, **variables):
        env = {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", **variables}
        start = ["bash", finetune_runs.FINETUNE.with_name("finetune_ds.sh")]
        run = LiveRun(
            live_runs.flags(model, data, output, *flags, steps=6, batch=batch), start=start, env=env
        )
        code, printed = run.end()
        assert code == 0, printed[-5000:]
        return [(line["loss"], line["grad_norm"]) for line in finetune_runs.losses(output)]

    recipe = {"GPUS_PER_NODE": "3", "DEEPSPEED": "ds_config_zero2_offload.json"}
    one = launch(tmp_path / "one", "--save_strategy", "no", batch=3, GPUS_PER_NODE="1", DEEPSPEED="")
    three = launch(tmp_path / "three", batch=1, **recipe)
    for found, expected in zip(three, one, strict=True):
        assert found == (
            pytest.approx(expected[0], rel=LOSS_TOLERANCE), pytest.approx(expected[1], rel=NORM_TOLERANCE),
        )  # fmt: skip
    (tmp_path / "again").mkdir()
    (tmp_path / "three" / "checkpoint-4").rename(tmp_path / "again" / "checkpoint-4")
    assert launch(tmp_path / "again", "--resume_from_checkpoint", "true", batch=1, **recipe) == three

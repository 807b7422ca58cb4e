"""Runs that are stopped, killed or out of disk, and continued: they are the uninterrupted one."""

import json
import re
import shlex
import shutil
import signal
import sys

import pytest
from safetensors.torch import load_file

from minicpm_tune import output_folder
from support import finetune_runs, live_runs, processes
from support.live_runs import LORA, STAGES, LiveRun, finish

STEPS = 8


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint, and seven rows: with two processes an epoch is four steps, and 6 is inside the second."""
    folder = tmp_path_factory.mktemp("resume")
    return live_runs.tiny(folder / "model"), live_runs.uneven_rows(folder / "data")


def arguments(small, output, *more, **kwargs):
    return live_runs.flags(*small, output, *more, **{"steps": STEPS, **kwargs})


def numbers(output):
    """What must be equal: the logged numbers of every step."""
    names = ("step", "loss", "grad_norm", "learning_rate", "epoch")
    return [[line[name] for name in names] for line in finetune_runs.losses(output)]


def weights(output):
    name = next(
        name for name in ("adapter_model.safetensors", "model.safetensors") if (output / name).is_file()
    )
    return load_file(output / name)


def assert_same_run(found, expected):
    assert numbers(found) == numbers(expected)
    one, two = weights(found), weights(expected)
    assert one.keys() == two.keys()
    assert all(one[key].equal(two[key]) for key in one)


def interrupted_at(step, whole, folder):
    """An output folder as it was when a run had got so far."""
    folder.mkdir()
    shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


def check_resume(small, tmp_path, *flags, processes, at=(4, 6)):
    """A run, and the same from its checkpoints at the end of an epoch and inside the second one.

    Inside the first, a wrong order of rows would not be seen: it would be that of the first epoch.
    """
    finish(arguments(small, tmp_path / "whole", *flags), processes=processes)
    for step in at:
        output = interrupted_at(step, tmp_path / "whole", tmp_path / f"from-{step}")
        finish(arguments(small, output, *flags, "--resume_from_checkpoint", "true"), processes=processes)
        assert_same_run(output, tmp_path / "whole")


def test_one_process_with_adapters_and_dropout_continues_exactly(small, tmp_path):
    """Two batches per step; the checkpoint is given by its path, the run goes into a new folder."""
    flags = (*LORA, "--lora_dropout", 0.2, "--gradient_accumulation_steps", 2)
    finish(arguments(small, tmp_path / "whole", *flags))
    output = tmp_path / "out"
    path = tmp_path / "whole" / "checkpoint-6"
    finish(arguments(small, output, *flags, "--resume_from_checkpoint", path))
    assert_same_run(output, tmp_path / "whole")
    assert output_folder.find_earlier_run(output).last_checkpoint == output / "checkpoint-8"


def test_zero_2_on_two_processes_continues_exactly(small, tmp_path):
    check_resume(small, tmp_path, *STAGES["zero2"], processes=2, at=(6,))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_continue_exactly(small, tmp_path, stage, kind):
    flags = (*LORA, "--lora_dropout", 0.1) if kind == "lora" else ()
    check_resume(small, tmp_path, *flags, *STAGES[stage], processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), LORA, STAGES["zero3"]], ids=["full", "lora", "zero3"])
def test_bf16_continues_exactly(small, tmp_path, flags):
    check_resume(small, tmp_path, "--bf16", "true", *flags, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["v2", "v4_5", "v4_6"])
def test_other_generations_continue_exactly(tmp_path, generation):
    small = live_runs.tiny(tmp_path / "model", generation), live_runs.uneven_rows(tmp_path / "data")
    check_resume(small, tmp_path, processes=0, at=(6,))


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--packing", "true"), ("--group_by_length", "true")])
def test_other_orders_of_rows_continue_exactly(small, tmp_path, more):
    check_resume(small, tmp_path, *more, processes=2, at=(6,))


@pytest.mark.slow
def test_data_workers_and_mixtures_continue_exactly(small, tmp_path):
    model, data = small
    mixture = f"{data}:0.5,{data}#5"
    check_resume((model, mixture), tmp_path, "--dataloader_num_workers", 1, processes=2)


@pytest.mark.slow
def test_without_deepspeed_another_number_of_processes_goes_on(small, tmp_path):
    finish(arguments(small, tmp_path / "whole"), processes=2)
    output = interrupted_at(2, tmp_path / "whole", tmp_path / "out")
    resume = ("--resume_from_checkpoint", "true")
    refused = finish(arguments(small, output, *resume), expected=1)
    assert "a step had 2 rows and now has 1" in refused
    printed = finish(arguments(small, output, *resume, batch=2))
    assert "written by 2 processes, this run has 1: the rows continue in their order" in printed
    for found, expected in zip(numbers(output), numbers(tmp_path / "whole"), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_sigterm_saves_and_the_printed_command_goes_on(small, tmp_path):
    """Stopped twice, by signals to torchrun's place and to one process; and continued past wrecks."""
    whole, output = tmp_path / "whole", tmp_path / "out"
    finish(arguments(small, whole, "--save_strategy", "no"), processes=2)
    run = LiveRun(arguments(small, output, "--save_strategy", "no"), processes=2, faults={"slow": 0.4})
    run.wait_for_step(1)
    run.process.send_signal(signal.SIGTERM)
    code, printed = run.end()
    assert code == 0, printed
    assert "SIGTERM: ending; a run that trains finishes its step and writes a checkpoint." in printed
    assert printed.count("SIGTERM") == 1
    stopped = output_folder.find_earlier_run(output)
    assert not stopped.finished
    step = int(stopped.last_checkpoint.name.partition("-")[2])
    assert step < STEPS
    assert f"Stopped after step {step} of {STEPS}; checkpoint-{step} holds everything." in printed
    assert json.loads((output / "run.json").read_text())["starts"][0]["outcome"] == "stopped"
    assert f"<strong>stopped</strong>, step {step} of {STEPS}" in (output / "report.html").read_text()
    command = shlex.split(
        next(line for line in printed.splitlines() if "--resume_from_checkpoint true" in line)
    )
    assert command[:3] == ["torchrun", "--nproc_per_node", "2"]
    # What a killed run may leave: a later checkpoint cut short, and one that was being written.
    cut = output / "checkpoint-900"
    shutil.copytree(stopped.last_checkpoint, cut)
    with (cut / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    (output / output_folder.UNFINISHED / "checkpoint-901").mkdir(parents=True)
    flags = command[command.index("--model_name_or_path") :]
    printed = finish(flags, processes=2)
    assert (
        "checkpoint-900 is not whole and is passed over: model.safetensors has 1000 bytes, expected"
        in printed
    )
    assert "checkpoint-901 was being written when the run ended, and is deleted" in printed
    assert f"Continuing from {output / f'checkpoint-{step}'}" in printed
    assert_same_run(output, whole)
    page = (output / "report.html").read_text()
    assert f"<strong>finished</strong>, step {STEPS} of {STEPS}" in page
    [losses] = re.findall(r"&#34;training&#34;, &#34;points&#34;: (.*?)}", page)
    assert [step for step, _ in json.loads(losses)] == list(range(1, STEPS + 1))  # one curve for both starts


@pytest.mark.slow
def test_a_checkpoint_of_weights_alone_starts_the_optimizer_anew_only_when_asked(small, tmp_path):
    flags = arguments(small, tmp_path / "out", "--save_only_model", "true")
    finish(flags)
    shutil.rmtree(tmp_path / "out" / "checkpoint-8")
    printed = finish([*flags, "--resume_from_checkpoint", "true"], expected=1)
    assert "lacks the optimizer's state and the place in the schedule and random numbers." in printed
    assert "Loading weights" not in printed
    printed = finish([*flags, "--resume_from_checkpoint", "true", "--allow_inexact_resume", "true"])
    assert "these start anew (--allow_inexact_resume true)" in printed
    assert len(finetune_runs.losses(tmp_path / "out")) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_while_saving_the_last_whole_checkpoint_goes_on(small, tmp_path, stage):
    flags = STAGES[stage]
    finish(arguments(small, tmp_path / "whole", *flags), processes=2)
    output = tmp_path / "out"
    finish(arguments(small, output, *flags), processes=2, faults={"kill_in_save": [1, 4]}, expected=1)
    assert (output / output_folder.UNFINISHED / "checkpoint-4").is_dir()
    assert output_folder.find_earlier_run(output).last_checkpoint == output / "checkpoint-2"
    finish(arguments(small, output, *flags, "--resume_from_checkpoint", "true"), processes=2)
    assert_same_run(output, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_inside_a_step_goes_on(small, tmp_path, stage):
    """kill -9 of every process at once, as by a lost machine, behind a checkpoint."""
    flags = STAGES[stage]
    finish(arguments(small, tmp_path / "whole", *flags), processes=2)
    output = tmp_path / "out"
    run = LiveRun(arguments(small, output, *flags), processes=2, faults={"slow": 2})
    run.wait_for_step(3)
    run.kill()
    left = output_folder.find_earlier_run(output)
    assert not left.finished
    assert left.last_checkpoint.name in ("checkpoint-2", "checkpoint-4")  # 4 on a busy machine
    finish(arguments(small, output, *flags, "--resume_from_checkpoint", "true"), processes=2)
    assert_same_run(output, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_adapters_on_quantized_weights_continue_exactly(small, tmp_path, stage):
    """Evaluations between the steps, which must not touch the 4-bit weights."""
    more = ("--eval_data_path", small[1], "--eval_strategy", "steps", "--eval_steps", 1)
    flags = (*LORA, "--q_lora", "true", "--lora_dropout", 0.1, *STAGES[stage], *more)
    check_resume(small, tmp_path, *flags, processes=2, at=(2,))


@pytest.mark.slow
def test_deepspeed_with_other_processes_stage_or_kind_is_refused(small, tmp_path):
    finish(arguments(small, tmp_path / "whole", *STAGES["zero2"]), processes=2)
    output = interrupted_at(2, tmp_path / "whole", tmp_path / "out")
    resume = ("--resume_from_checkpoint", "true")
    printed = finish(arguments(small, output, *STAGES["zero2"], *resume, batch=2), processes=1, expected=1)
    assert "written by 2 processes, this run has 1. DeepSpeed's state is divided among them" in printed
    printed = finish(arguments(small, output, *STAGES["zero3"], *resume), processes=2, expected=1)
    assert "written under DeepSpeed ZeRO-2, this run is under DeepSpeed ZeRO-3" in printed
    assert "Traceback" not in printed


def test_a_full_disk_is_a_message_and_the_last_checkpoint_stays(small, tmp_path):
    output = tmp_path / "out"
    printed = finish(arguments(small, output), faults={"full_disk": 4}, expected=1)
    assert "Traceback" not in printed
    message = printed[printed.index("error: ") :]
    assert "checkpoint-4 could not be written: No space left on device." in message
    assert "checkpoint-2 is whole: continue from it with --resume_from_checkpoint true." in message
    assert output_folder.find_earlier_run(output).last_checkpoint == output / "checkpoint-2"
    assert not (output / output_folder.UNFINISHED / "checkpoint-4").exists()


def test_an_output_folder_that_cannot_be_written_is_told_before_the_model_loads(small):
    words = [sys.executable, finetune_runs.FINETUNE, *arguments(small, "/proc/1/nowhere")]
    process = processes.run(words, limit=live_runs.LIMIT)
    assert process.returncode == 1
    assert "error: --output_dir '/proc/1/nowhere' can't be written to on " in process.stderr
    assert "Loading weights" not in process.stderr

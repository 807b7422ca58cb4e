"""SIGINT, SIGTERM and SIGHUP in every stage of a run, and a terminal that goes away."""

import os
import pty
import signal
import sys
import time
from pathlib import Path

import pytest

from minicpm_tune import output_folder
from support import live_runs
from support.live_runs import WORKER, LiveRun, start_words
from support.paths import FINETUNE

STEPS = 8
AT_ONCE = 20  # seconds; the machine may be busy


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    return live_runs.tiny(folder / "model"), live_runs.uneven_rows(folder / "data")


def arguments(small, output, *more):
    return live_runs.flags(*small, output, *more, steps=STEPS)


def wait_for_training(run):
    run.wait_for((run.output / "slow").exists, limit=live_runs.LIMIT)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
@pytest.mark.parametrize("processes", [0, 2])
def test_the_first_signal_ends_training_with_a_checkpoint_and_one_line(small, tmp_path, processes, number):
    run = LiveRun(arguments(small, tmp_path / "out"), processes=processes, faults={"slow": 1})
    wait_for_training(run)
    run.process.send_signal(number)
    code, printed = run.end()
    assert code == 0, printed
    assert printed.count(signal.Signals(number).name) == 1
    assert "holds everything. To continue" in printed
    assert output_folder.find_earlier_run(tmp_path / "out").last_checkpoint is not None


@pytest.mark.slow
def test_a_signal_to_one_process_of_a_run_ends_all_of_it(small, tmp_path):
    run = LiveRun(arguments(small, tmp_path / "out"), processes=2, faults={"slow": 0.4})
    run.wait_for_step(1)
    os.kill(run.workers()[1], signal.SIGTERM)
    code, printed = run.end()
    assert code == 0, printed
    assert "holds everything. To continue" in printed


@pytest.mark.parametrize("processes", [0, 2])
def test_a_second_signal_ends_at_once(small, tmp_path, processes):
    run = LiveRun(arguments(small, tmp_path / "out"), processes=processes, faults={"slow": live_runs.LIMIT})
    wait_for_training(run)
    run.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    run.process.send_signal(signal.SIGTERM)
    code, printed = run.end(limit=AT_ONCE)  # all of its processes
    assert code == 128 + signal.SIGTERM, printed
    assert "A second signal ends" in printed


def imports_torch(pid):
    try:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:  # it has ended
        return False


@pytest.mark.parametrize("processes", [0, 1])
def test_ctrl_c_before_training_is_one_line_and_code_130(small, tmp_path, processes):
    """During the imports, which take seconds; the later stages have tests of their own."""
    run = LiveRun(arguments(small, tmp_path / "out"), processes=processes)
    run.wait_for(lambda: imports_torch(run.process.pid), limit=live_runs.LIMIT)
    run.process.send_signal(signal.SIGINT)
    code, printed = run.end(limit=AT_ONCE)
    assert code == 130, printed
    assert len(printed.split("\n")) == 3, printed  # an empty line before, and the end of the line
    assert printed.startswith("\nSIGINT: ")
    assert ("nothing is saved" in printed) == (processes == 0)


def test_ctrl_c_while_the_launcher_looks_at_the_hardware_leaves_no_traceback(small, tmp_path):
    variables = {"GPUS_PER_NODE": "1", "DEEPSPEED": "", "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    start = ["sh", FINETUNE / "finetune_lora.sh"]
    run = LiveRun(arguments(small, tmp_path / "out"), start=start, env=variables)
    run.wait_for(lambda: any(imports_torch(found.pid) for found in run.processes()), limit=live_runs.LIMIT)
    os.killpg(run.process.pid, signal.SIGINT)
    code, printed = run.end(limit=AT_ONCE)
    assert code in (130, -signal.SIGINT), printed
    assert "Traceback" not in printed


def test_ctrl_c_in_the_check_of_rows_ends_with_its_workers(small, tmp_path):
    """The whole group gets it, as from a terminal."""
    rows = live_runs.uneven_rows(tmp_path / "data", count=450)  # enough for workers
    flags = live_runs.flags(small[0], rows, tmp_path / "out")
    run = LiveRun(flags, faults={"slow_check": 1})
    wait_for_training(run)
    os.killpg(run.process.pid, signal.SIGINT)
    code, printed = run.end(limit=AT_ONCE)
    assert code == 130, printed
    assert printed.count("SIGINT") == 1
    assert "Traceback" not in printed


@pytest.mark.slow
def test_ctrl_c_while_weights_are_loaded_waits_for_none_of_them(small, tmp_path):
    reached = tmp_path / "reached"
    run = LiveRun(arguments(small, tmp_path / "out"), faults={"slow_weights": [str(reached), 1]})
    run.wait_for(reached.exists, limit=live_runs.LIMIT)
    run.process.send_signal(signal.SIGINT)
    code, printed = run.end(limit=AT_ONCE)
    assert code == 130, printed
    assert "nothing is saved" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("processes", [0, 1])
def test_a_terminal_that_is_closed_ends_no_run_but_lets_it_save(small, tmp_path, processes):
    """The kernel sends SIGHUP, and every write fails with errno 5 from then on."""
    ours, theirs = pty.openpty()
    on_terminal = [
        "sh",
        "-c",
        f'exec "$@" <>{os.ttyname(theirs)} >&0 2>&0',
        "sh",
        *start_words(WORKER, processes),
    ]
    run = LiveRun(arguments(small, tmp_path / "out"), start=on_terminal, faults={"slow": 1})
    wait_for_training(run)
    os.close(theirs)
    os.close(ours)
    assert run.end()[0] == 0
    assert output_folder.find_earlier_run(tmp_path / "out").last_checkpoint is not None


def test_nohup_stays_in_force(small, tmp_path):
    start = ["nohup", *start_words(WORKER, 1)]
    run = LiveRun(arguments(small, tmp_path / "out"), start=start, faults={"slow": 0.1})
    wait_for_training(run)
    run.process.send_signal(signal.SIGHUP)
    assert run.end()[0] == 0
    assert output_folder.find_earlier_run(tmp_path / "out").finished

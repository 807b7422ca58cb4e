"""Several launchers: machines of one run, runs beside each other, processes that are started again."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from minicpm_tune import output_folder
from support import finetune_runs, live_runs
from support.live_runs import STAGES, LiveRun

LAUNCHER = finetune_runs.FINETUNE.with_name("finetune_ds.sh")
LOSS_TOLERANCE = 1e-5  # relative; as in test_distributed.py
NORM_TOLERANCE = 1e-4
ALL_END_WITHIN = 30  # seconds after a process failed


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    return live_runs.tiny(folder / "model"), live_runs.uneven_rows(folder / "data")


def numbers(output):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in finetune_runs.losses(output)]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for (step, loss, norm), (wanted_step, wanted_loss, wanted_norm) in zip(found, expected, strict=True):
        assert step == wanted_step
        assert loss == pytest.approx(wanted_loss, rel=LOSS_TOLERANCE)
        assert norm == pytest.approx(wanted_norm, rel=NORM_TOLERANCE)


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


def launch(flags, *, before=(), shell="sh", **variables):
    """Start a launcher; give it as a run to wait for."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = {"GPUS_PER_NODE": "1", "DEEPSPEED": "", "PATH": path, **variables}
    return LiveRun(flags, start=[*before, shell, LAUNCHER], env=given)


def end_all(nodes):
    for run in nodes:
        code, printed = run.end()
        assert code == 0, printed[-5000:]


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory):
    """One process that takes the rows of two."""
    output = tmp_path_factory.mktemp("alone") / "out"
    end_all([launch(live_runs.flags(*small, output, "--save_strategy", "no", batch=2))])
    return numbers(output)


def test_two_launchers_on_one_machine_are_one_run(small, alone, tmp_path):
    flags = live_runs.flags(*small, tmp_path / "out")
    port = free_port()
    end_all([launch(flags, NNODES="2", NODE_RANK=str(rank), MASTER_PORT=port) for rank in (0, 1)])
    assert_same(numbers(tmp_path / "out"), alone)
    assert output_folder.read_manifest(tmp_path / "out" / "checkpoint-4")["processes"] == 2
    assert sorted(path.name for path in (tmp_path / "out" / "logs").glob("rank*")) == [
        "rank0.log",
        "rank1.log",
    ]


def test_two_runs_at_once_take_two_ports_and_never_one_folder(small, tmp_path):
    port = free_port()
    first = launch(live_runs.flags(*small, tmp_path / "first", steps=4000), MASTER_PORT=port)
    first.wait_for_step(1)
    second = launch(live_runs.flags(*small, tmp_path / "second"), MASTER_PORT=port)
    into_the_same = launch(
        live_runs.flags(*small, tmp_path / "first", "--resume_from_checkpoint", "true"), MASTER_PORT=port
    )
    code, printed = second.end()
    assert code == 0, printed
    assert f"Port {port} is in use on this machine; using" in printed
    code, printed = into_the_same.end()
    assert code == 1
    assert f"'{tmp_path / 'first'}' is in use by another run (process " in printed
    assert "Traceback" not in printed
    first.process.send_signal(signal.SIGTERM)
    code, printed = first.end()
    assert code == 0, printed
    assert "To continue, in " in printed
    assert output_folder.find_earlier_run(tmp_path / "first").last_checkpoint is not None


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_on_one_machine_ends_the_other_and_is_shown_there_too(small, tmp_path, failing):
    port, nodes = free_port(), []
    for rank in (0, 1):
        start = [
            sys.executable,
            live_runs.START,
            "--nproc_per_node",
            "1",
            "--nnodes",
            "2",
            "--node_rank",
            str(rank),
        ]
        start += ["--master_addr", "localhost", "--master_port", port, live_runs.WORKER]
        faults = {"raise": [failing, 3]}
        nodes.append(LiveRun(live_runs.flags(*small, tmp_path / "out"), start=start, faults=faults))
    nodes[0].wait_for_step(2)
    since = time.monotonic()
    ended = [run.end() for run in nodes]
    assert time.monotonic() - since < ALL_END_WITHIN
    assert [code for code, _ in ended] == [1, 1]
    there, elsewhere = ended[failing][1], ended[1 - failing][1]
    assert there.count("Traceback") == 1
    assert there.count("KeyError: 'planted error'") == 1
    assert "Traceback" not in elsewhere
    assert elsewhere.count(f"error: process {failing} on ") == 1
    assert "failed: 'planted error'" in elsewhere


@pytest.mark.slow
def test_a_rendezvous_address_instead_of_ranks(small, alone, tmp_path):
    flags = live_runs.flags(*small, tmp_path / "out")
    address = f"localhost:{free_port()}"
    end_all([launch(flags, NNODES="2", RDZV=address, RDZV_ID="one") for _ in range(2)])
    assert_same(numbers(tmp_path / "out"), alone)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_machines_with_folders_of_their_own_save_and_continue(small, tmp_path, stage):
    deepspeed = STAGES[stage][1] if STAGES[stage] else ""

    def both(tag, *more):
        port = free_port()
        nodes = []
        for rank in (0, 1):
            flags = live_runs.flags(*small, tmp_path / f"{tag}{rank}", *more)
            nodes.append(
                launch(flags, NNODES="2", NODE_RANK=str(rank), MASTER_PORT=port, DEEPSPEED=deepspeed)
            )
        end_all(nodes)

    both("whole")
    for rank in (0, 1):
        whole = tmp_path / f"whole{rank}"
        assert output_folder.is_checkpoint(whole / "checkpoint-2")
        shutil.copytree(whole / "checkpoint-2", tmp_path / f"again{rank}" / "checkpoint-2")
    # Saved on the second machine alone: it was stopped a moment later than the first.
    shutil.copytree(tmp_path / "whole1" / "checkpoint-4", tmp_path / "again1" / "checkpoint-4")
    both("again", "--resume_from_checkpoint", "true")
    assert numbers(tmp_path / "again0") == numbers(tmp_path / "whole0")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "rendezvous"), [("none", False), ("zero2", True), ("zero3", True)])
def test_processes_are_started_again_after_one_was_killed(small, tmp_path, stage, rendezvous):
    deepspeed = STAGES[stage][1] if STAGES[stage] else ""
    steps = 60
    variables = {"GPUS_PER_NODE": "2", "DEEPSPEED": deepspeed, "MASTER_PORT": free_port()}
    end_all([launch(live_runs.flags(*small, tmp_path / "whole", steps=steps), **variables)])
    more = {"RDZV": f"localhost:{free_port()}"} if rendezvous else {}
    run = launch(
        live_runs.flags(*small, tmp_path / "out", steps=steps), MAX_RESTARTS="2", **variables, **more
    )
    # Inside the second epoch, of four steps each.
    run.wait_for_step(6)
    os.kill(run.workers()[1], signal.SIGKILL)
    end_all([run])
    assert "run_folder: Continuing from" in (tmp_path / "out" / "logs" / "rank0.log").read_text()
    assert numbers(tmp_path / "out") == numbers(tmp_path / "whole")


@pytest.fixture
def machines():
    """Two network namespaces joined by a pair of devices: two machines, as far as the network goes."""
    name = f"ft{uuid.uuid4().hex[:6]}"
    names, devices = (f"{name}a", f"{name}b"), (f"{name}0", f"{name}1")
    commands = [
        *(["netns", "add", space] for space in names),
        ["link", "add", devices[0], "type", "veth", "peer", "name", devices[1]],
    ]
    for number, (space, device) in enumerate(zip(names, devices, strict=True), start=1):
        commands += [
            ["link", "set", device, "netns", space],
            ["-n", space, "addr", "add", f"10.77.0.{number}/24", "dev", device],
            ["-n", space, "link", "set", device, "up"],
            ["-n", space, "link", "set", "lo", "up"],
        ]
    if shutil.which("ip") is None:
        pytest.skip("there is no ip command")
    try:
        for command in commands:
            done = subprocess.run(["ip", *command], capture_output=True, text=True, timeout=20, check=False)
            if done.returncode:
                pytest.skip(f"network namespaces are not allowed here: {done.stderr.strip()}")
        yield list(zip(names, devices, strict=True))
    finally:
        for space in names:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, timeout=20, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", [False, True])
def test_two_machines_on_a_network(small, alone, tmp_path, machines, rendezvous):
    nodes = []
    for rank, (space, device) in enumerate(machines):
        inside = {"GLOO_SOCKET_IFNAME": device, "NNODES": "2"}
        if rendezvous:
            inside |= {"RDZV": "10.77.0.1:29411", "LOCAL_ADDR": f"10.77.0.{rank + 1}"}
            inside |= {"RDZV_CONF": f"is_host={int(rank == 0)}"}  # both have this machine's name
        else:
            inside |= {"NODE_RANK": str(rank), "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29411"}
        flags = live_runs.flags(*small, tmp_path / "out")
        nodes.append(launch(flags, before=["ip", "netns", "exec", space], **inside))
    end_all(nodes)
    assert_same(numbers(tmp_path / "out"), alone)

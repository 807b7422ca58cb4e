"""Starting the processes: machines that don't come together, and processes that are started again."""

import shutil
import sys

import pytest
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

import start_processes
from support import processes
from support.paths import FINETUNE

TAKEN = DistNetworkError("The server socket has failed to listen: code: -98, name: EADDRINUSE")


def options(port, *, nodes=1):
    return [
        "--nnodes",
        str(nodes),
        "--node_rank",
        "0",
        "--master_addr",
        "localhost",
        "--master_port",
        str(port),
    ]


@pytest.fixture
def without_signals(monkeypatch):
    """Leave this process's own handlers alone."""
    monkeypatch.setattr(start_processes, "handle", lambda *_: None)
    monkeypatch.setenv(start_processes.LAUNCHED, "1")


@pytest.mark.parametrize(
    ("error", "reason", "remedy"),
    [
        (TAKEN, "EADDRINUSE", "choose another, the same on all machines"),
        (
            DistStoreError("Timed out: 1/2 clients joined.\nmore"),
            "(Timed out: 1/2 clients joined.)",
            "MASTER_ADDR",
        ),
        (RendezvousTimeoutError(), "(RendezvousTimeoutError)", "their number in NNODES"),
    ],
)
def test_machines_that_do_not_meet_are_one_message(
    monkeypatch, capsys, without_signals, error, reason, remedy
):
    def fail(argv):
        raise error

    monkeypatch.setattr("torch.distributed.run.main", fail)
    assert start_processes.main([*options(6001, nodes=2), "finetune.py"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the 2 machines of the run did not find each other at localhost:6001")
    assert said.count("\n") == 1
    assert reason in said
    assert remedy in said


def test_errors_of_the_program_are_not_taken_for_the_networks(monkeypatch, without_signals):
    def fail(argv):
        raise RuntimeError("something else")

    monkeypatch.setattr("torch.distributed.run.main", fail)
    with pytest.raises(RuntimeError, match="something else"):
        start_processes.main([*options(6001), "finetune.py"])


@pytest.mark.parametrize(
    ("endpoint", "given"),
    [
        ("localhost:0", ["--local_addr", "127.0.0.1"]),
        ("127.0.0.1:29400", ["--local_addr", "127.0.0.1"]),
        ("no-such-machine.invalid:29400", []),
    ],
)
def test_a_machine_gives_the_address_from_which_it_reaches_the_others(endpoint, given):
    argv = ["--rdzv_endpoint", endpoint, "finetune.py"]
    assert start_processes.with_own_address(argv) == [*given, *argv]


def test_an_address_of_its_own_choice_stays_and_without_an_endpoint_there_is_none():
    for argv in (["--rdzv_endpoint", "localhost:0", "--local_addr", "10.0.0.7"], options(6001)):
        assert start_processes.with_own_address(argv) == argv


# In every start one process is late to join; then the second one dies, until the restarts are used up.
JOINS = """
import datetime, os, sys, time
import torch.distributed as dist
start, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
time.sleep(2.0 * (start > 0 and rank == start % 2))
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
dist.barrier()
sys.stdout.write(f"process {rank} joined start {start}\\n")
sys.stdout.flush()
if start < 2:
    time.sleep(0.5)
    os._exit(rank)
dist.barrier()
os._exit(0)
"""


def test_processes_that_are_started_again_find_each_other_and_not_those_that_ended(tmp_path):
    for name in ("finetune_lora.sh", "launcher.sh", "start_processes.py"):
        shutil.copy(FINETUNE / name, tmp_path)
    (tmp_path / "minicpm_tune").symlink_to(FINETUNE / "minicpm_tune")
    (tmp_path / "finetune.py").write_text(JOINS)
    (tmp_path / "config.json").write_text("{}")  # what the launcher's check of the command line looks for
    given = {"MODEL": str(tmp_path), "DATA": str(tmp_path / "config.json"), "DEEPSPEED": ""}
    variables = {"GPUS_PER_NODE": "2", "MAX_RESTARTS": "2", "OUTPUT_DIR": str(tmp_path / "out"), **given}
    variables["PATH"] = f"{sys.prefix}/bin:{processes.environment()['PATH']}"
    done = processes.run(
        ["sh", tmp_path / "finetune_lora.sh"], env={**processes.environment(), **variables}, limit=150
    )
    assert done.returncode == 0, done.stderr
    joined = sorted(done.stdout.splitlines())
    assert joined == [f"process {rank} joined start {start}" for rank in (0, 1) for start in range(3)]


def test_what_an_exit_code_says():
    assert start_processes.why_a_process_ended(1) == "shown above (exit code 1)"
    assert start_processes.why_a_process_ended(-9).startswith(
        "SIGKILL has ended a process, perhaps because the machine"
    )
    assert start_processes.why_a_process_ended(-11) == "SIGSEGV has ended a process"

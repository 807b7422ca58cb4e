"""Starting the processes: machines that don't come together."""

import pytest
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

import start_processes

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
    monkeypatch.setattr(start_processes.signal, "signal", lambda *_: None)


@pytest.mark.parametrize(
    ("error", "reason", "remedy"),
    [
        (TAKEN, "EADDRINUSE", "choose another, the same on all machines"),
        (
            DistStoreError("Timed out: 1/2 clients joined.\nmore"),
            "(Timed out: 1/2 clients joined.)",
            "MASTER_ADDR",
        ),
        (RendezvousTimeoutError(), "(RendezvousTimeoutError)", "NNODES as many as there are"),
    ],
)
def test_machines_that_do_not_meet_are_one_message(
    monkeypatch, capsys, without_signals, error, reason, remedy
):
    def fail(argv):
        raise error

    monkeypatch.setattr(start_processes.run, "main", fail)
    assert start_processes.main([*options(6001, nodes=2), "finetune.py"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the 2 machines of the run did not find each other at localhost:6001")
    assert said.count("\n") == 1
    assert reason in said
    assert remedy in said


def test_errors_of_the_program_are_not_taken_for_the_networks(monkeypatch, without_signals):
    def fail(argv):
        raise RuntimeError("something else")

    monkeypatch.setattr(start_processes.run, "main", fail)
    with pytest.raises(RuntimeError, match="something else"):
        start_processes.main([*options(6001), "finetune.py"])

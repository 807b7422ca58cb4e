"""Starts the processes of a run, as torchrun does, and ends as they end.

    python start_processes.py [torchrun's options] finetune.py [arguments]

torchrun kills its processes half a minute after a signal and then reports a failure of its own. A run that
is asked to stop finishes its step and writes a checkpoint, which may take longer, and that is no failure:
here a signal is passed on to the processes, and their end is waited for; a second signal kills them. And where
two runs on one machine take the same port at the same moment, the second takes another.

Imports that take seconds stand where they are used, so that ``--help`` and messages come at once.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from argparse import Namespace
from itertools import pairwise
from types import FrameType

from minicpm_tune.training.process_lifecycle import LAUNCHED, SIGNALS, handle, say

# What is left for torchrun's own handler, which ends the processes at once.
_SIGNALS_TO_HANDLE = "--signals_to_handle=SIGQUIT"
_FAILED = 1
_TAKEN = "EADDRINUSE"


class SignalPasser:
    """Passes the first signal on to the processes of the run, which know what to do with it; kills them at the second.

    Attributes:
        passed_on: The first signal, or None.
    """

    def __init__(self) -> None:
        self.passed_on: int | None = None
        os.environ[LAUNCHED] = "1"
        for number in SIGNALS:
            handle(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        import psutil

        me = psutil.Process()
        if self.passed_on is not None or not me.children():
            for child in me.children(recursive=True):
                child.kill()
            say(number, "ended.")
            os._exit(128 + number)
        self.passed_on = number
        say(
            number,
            "ending; a run that trains finishes its step and writes a checkpoint. A second signal ends at once.",
        )
        for child in me.children():
            try:
                child.send_signal(number)
            except psutil.NoSuchProcess:
                continue


def with_own_address(argv: list[str]) -> list[str]:
    """The options with the address under which the other machines reach this one.

    torchrun takes the machine's name, which the others often can't resolve. This is the address from which it
    reaches the rendezvous.
    """
    options = dict(pairwise(argv))
    endpoint = options.get("--rdzv_endpoint")
    if endpoint is None or "--local_addr" in options:
        return argv
    host = endpoint.rpartition(":")[0].strip("[]")
    try:
        found = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)
        # IPv4, if it has one.
        family, kind, _, _, address = min(found, key=lambda place: place[0] != socket.AF_INET)
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            return ["--local_addr", str(probe.getsockname()[0]), *argv]
    except OSError:
        return argv  # the rendezvous will say that it can't be reached


def main(argv: list[str]) -> int:
    """Run the processes, and give 0 when all of them ended well."""
    signals = SignalPasser()
    argv = with_own_address(argv)
    # Imported here: torch takes seconds, in which a signal may come.
    from torch.distributed import DistError, DistNetworkError, run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    if "--max_restarts" not in argv:
        # It would tell, below the message of the process that failed, that a process has failed (torch 2.13).
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        try:
            run.main([_SIGNALS_TO_HANDLE, *argv])
        except DistNetworkError as error:
            run.main([_SIGNALS_TO_HANDLE, *with_another_port(argv, error)])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if signals.passed_on in (failure.exitcode - 128, -failure.exitcode):
            return 128 + signals.passed_on
        sys.stderr.write(f"The run ended with an error: {why_a_process_ended(failure.exitcode)}.\n")
        return _FAILED
    except (DistError, RendezvousError) as error:
        sys.stderr.write(f"error: {why_machines_did_not_meet(error, run.parse_args(argv))}\n")
        return _FAILED
    return 0


def why_a_process_ended(code: int) -> str:
    """What an exit code says; the reason itself the process has shown, and torchrun's own report would bury it."""
    if code >= 0:
        return f"shown above (exit code {code})"
    hint = ", perhaps because the machine ran out of memory (see dmesg)" if code == -signal.SIGKILL else ""
    return f"{signal.Signals(-code).name} has ended a process{hint}"


def with_another_port(argv: list[str], error: Exception) -> list[str]:
    """The options with a port that is free, after another run took the one that was free a moment ago.

    Raises:
        DistNetworkError: The one given, when it says something else, or when the port is also what other
            machines look for.
    """
    from minicpm_tune.settings.hardware import free_port

    options = dict(pairwise(argv))
    port = options.get("--master_port")
    if _TAKEN not in str(error) or options.get("--nnodes") != "1" or port is None:
        raise error
    found = str(free_port(0))
    sys.stderr.write(f"Another run has just taken port {port}; using {found}.\n")
    at = argv.index("--master_port") + 1
    return [*argv[:at], found, *argv[at + 1 :]]


def why_machines_did_not_meet(error: Exception, own: Namespace) -> str:
    """Say why the machines of a run did not come or stay together.

    Args:
        error: What torchrun raised.
        own: Its options.
    """
    where = own.rdzv_endpoint or f"{own.master_addr}:{own.master_port}"
    reason = str(error).partition("\n")[0] or type(error).__name__
    text = f"the {own.nnodes} machines of the run did not find each other at {where}, or lost each other ({reason}). "
    if _TAKEN in str(error):
        return (
            f"{text}Another program uses that port: choose another, the same on all machines (MASTER_PORT)."
        )
    return (
        f"{text}Start the same command on each of them, with the address of the first in MASTER_ADDR (or RDZV), a port "
        "that the others can reach, and their number in NNODES."
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

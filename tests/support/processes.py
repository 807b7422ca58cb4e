"""Processes that tests start: a time limit for each, and at the limit the stacks of all, and an end of all.

Output goes to files, not pipes: a process that is left behind can't hold up the test that reads the output.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psutil

from support.paths import SUPPORT

# Options of torchrun for processes of this machine that find each other at a free port.
TOGETHER = ("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0")
_MARK = "STARTED_BY_TEST"  # environment variable that all processes started by one ``Started`` inherit
_SHOWN = 6000  # characters of the output in a message
_STACKS = 1.0  # seconds to write stacks down

_running: list[Started] = []


def environment():
    """Variables of a program on the CPU, offline, with one thread, so that several run beside each other."""
    quiet = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cpu",
    }
    return {**os.environ, **quiet, "CUDA_VISIBLE_DEVICES": ""}


def torchrun(processes, program):
    """The words that start so many processes of a program."""
    return [sys.executable, "-m", "torch.distributed.run", *TOGETHER, "--nproc_per_node", processes, program]


class TookTooLongError(AssertionError):
    """A process did not end within its limit."""


class Started:
    """A started program, with all processes that come from it.

    Args:
        words: The command line.
        env: Its whole environment; by default ``environment()``.
        cwd: Its folder.
        stdin: What it reads; by default nothing.
        merged: Write both streams into one, as a screen shows them.
    """

    def __init__(self, words, *, env=None, cwd=None, stdin="", merged=False):
        self.words = [str(word) for word in words]
        self._folder = Path(tempfile.mkdtemp(prefix="test-process-"))
        self._mark = uuid.uuid4().hex
        (self._folder / "in").write_text(stdin)
        given = dict(environment() if env is None else env)
        path = [str(SUPPORT / "stacks_on_signal"), *filter(None, [given.get("PYTHONPATH")])]
        given |= {_MARK: self._mark, "STACKS_FOLDER": str(self._folder), "PYTHONPATH": os.pathsep.join(path)}
        with (
            (self._folder / "in").open("rb") as source,
            (self._folder / "out").open("wb") as out,
            (self._folder / "err").open("wb") as err,
        ):
            self.process = subprocess.Popen(
                self.words, env=given, cwd=cwd, stdin=source, stdout=out,
                stderr=subprocess.STDOUT if merged else err, start_new_session=True,
            )  # fmt: skip
        _running.append(self)

    def printed(self, stream="out"):
        """What a stream has so far."""
        return (self._folder / stream).read_text(encoding="utf-8", errors="replace")

    def processes(self):
        """All of its processes that run, also those whose parent has ended."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def wait_for(self, condition, *, limit):
        """Wait until a condition holds; fails when the program ends before."""
        until = time.monotonic() + limit
        while not condition():
            assert self.process.poll() is None, f"it has ended:\n{self._tail()}"
            if time.monotonic() > until:
                raise TookTooLongError(f"still waiting after {limit} s:\n{self._tail()}\n{self.kill()}")
            time.sleep(0.05)

    def end(self, *, limit):
        """Wait for the end of all its processes; give exit code and output.

        Raises:
            TookTooLongError: If they have not ended after ``limit`` seconds; with their stacks. Then they are killed.
        """
        until = time.monotonic() + limit
        try:
            self.process.wait(limit)
            while self.processes():
                if time.monotonic() > until:
                    raise subprocess.TimeoutExpired(self.words, limit)
                time.sleep(0.1)
        except subprocess.TimeoutExpired:
            raise TookTooLongError(
                f"{' '.join(self.words)[:500]}\ndid not end in {limit} s. It printed:\n{self._tail()}\n{self.kill()}"
            ) from None
        done = subprocess.CompletedProcess(
            self.words, self.process.returncode, self.printed("out"), self.printed("err")
        )
        self._forget()
        return done

    def kill(self):
        """Kill all its processes; give a text with the stacks they had."""
        found = self.processes()
        for process in found:
            _send(process, signal.SIGUSR2)
        time.sleep(_STACKS if found else 0)
        reports = []
        for process in found:
            file = self._folder / f"{process.pid}.txt"
            stack = file.read_text(errors="replace") if file.is_file() else "(not Python)"
            reports.append(f"--- process {process.pid}: {_command(process)}\n{stack}")
        # Those that were started meanwhile too.
        while left := self.processes():
            for process in left:
                _send(process, signal.SIGKILL)
            time.sleep(0.05)
        self.process.wait()
        self._forget()
        return "\n".join(reports)

    def _tail(self):
        return (self.printed("out") + self.printed("err"))[-_SHOWN:]

    def _forget(self):
        _running.remove(self)
        shutil.rmtree(self._folder)


def run(words, *, limit, **options):
    """Run a program to its end, like ``subprocess.run`` with captured text; at the limit it and its children end.

    Args:
        words: The command line.
        limit: Seconds.
        options: As for ``Started``.
    """
    return Started(words, **options).end(limit=limit)


def end_what_runs():
    """Kill what a test has left running; give the stacks, or an empty text when there is nothing."""
    return "\n".join(started.kill() for started in list(_running))


def _send(process, number):
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass


def _command(process):
    try:
        return " ".join(process.cmdline())[:300]
    except psutil.Error:
        return "?"

"""Each process tells the others that it is alive and where it stands, so that none waits for ever.

A collective operation waits for all processes. When one has failed, was killed, or hangs, the others see
nothing of it: over NCCL they wait in silence, over gloo they fail with a message about a connection. So a
thread in every process publishes, in the store through which the processes found each other, how far it
has come, and looks at what the others say. The first to fail leaves its message; the rest end without one.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import torch

from minicpm_tune import processes
from minicpm_tune.logs import LOG_ONLY

logger = logging.getLogger(LOG_ONLY)

_INTERVAL = 1.0  # seconds between two looks
_GRACE = 5.0  # seconds that a process whose peer failed gets to end by itself
_SILENCE = 90.0  # seconds without a heartbeat, after which a process on another machine counts as gone
_FAILED = "failed"  # the key under which the first process to fail leaves its message
T = TypeVar("T")


class Heartbeat(NamedTuple):
    """What a process tells of itself.

    Attributes:
        host: Its machine.
        pid: Its process id there.
        number: Goes up by one per look.
        stages: Goes up by one with each stage of the work; the same on every process at the same point.
        stage: The stage it is at, in words.
        done: It has left the work in good order.
    """

    host: str
    pid: int
    number: int
    stages: int
    stage: str
    done: bool


class PeerMonitor:
    """The watch of one process over the others; with a single process in the run it watches nothing.

    Args:
        limit: Seconds to wait for others at one stage (``--ddp_timeout``).
        stack_log: Where the stacks of all threads are written before another's failure ends this process.
    """

    def __init__(self, *, limit: float, stack_log: IO[str] | None = None):
        self.limit, self._stack_log = limit, stack_log
        self.rank, self.world = 0, 1
        self._stages, self._stage, self._since = 0, "starting", time.monotonic()
        self._store: torch.distributed.Store | None = None
        self._number, self._done = 0, False
        self._seen: dict[int, tuple[Heartbeat, float]] = {}

    def start(self) -> None:
        """Start watching; every process calls it, once they have joined."""
        self.rank, self.world = processes.joined()
        if self.world == 1:
            return
        # A connection of its own: in a shared one, a waiting call of the main thread would hold up ours.
        connection = torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False
        )
        run = processes.gather(uuid.uuid4().hex)[0]
        store = torch.distributed.PrefixStore(f"finetune/{run}", connection)
        self._publish(store)
        processes.gather(None)  # from here on all have published
        self._store = store
        threading.Thread(target=self._watch, name="peer monitor", daemon=True).start()

    def mark(self, stage: str) -> None:
        """Say what is being done now. All processes make the same marks in the same order."""
        self._stages, self._stage, self._since = self._stages + 1, stage, time.monotonic()

    def finish(self) -> None:
        """Say that this process has done its work; from now on it may end without being missed."""
        self.mark("done")
        self._done = True
        self._try(self._publish)

    def report_failure(self, text: str) -> bool:
        """Leave the message of a failure.

        Args:
            text: One line, shown in the logs of the others.

        Returns:
            True for the first process that fails: it is the one to show its message on the screen.
        """
        mine = json.dumps([self.rank, socket.gethostname(), _machine(), text])
        kept = self._try(lambda store: store.compare_set(_FAILED, "", mine).decode())
        return kept is None or kept == mine

    def show_failure_elsewhere(self) -> None:
        """Show on this machine's screen, once, that a process on another machine has failed."""
        failure = self._try(self._failure) if processes.local_rank() == 0 else None
        if failure is not None and failure[0] != _machine():
            _show(failure[1])

    def reason_of_others(self, patience: float) -> str | None:
        """Why an operation with the others may have failed here: who failed, is gone, or is missing.

        Args:
            patience: Seconds to wait for a reason to show.
        """
        until = time.monotonic() + patience
        while self._store is not None:
            reason = self._try(lambda store: self._reason(store, 0.8 * self.limit))
            if reason is not None or time.monotonic() > until:
                return reason
            time.sleep(_INTERVAL / 4)
        return None

    def _reason(self, store: torch.distributed.Store, limit: float) -> str | None:
        failure = self._failure(store)
        return failure[1] if failure else self._gone(store) or self._missing(store, limit)

    def _try(self, call: Callable[[torch.distributed.Store], T]) -> T | None:
        if self._store is None:
            return None
        try:
            return call(self._store)
        except RuntimeError as error:  # all of torch.distributed's are
            logger.info("the store did not answer: %s", error)
            return None

    def _publish(self, store: torch.distributed.Store) -> None:
        self._number += 1
        beat = (socket.gethostname(), os.getpid(), self._number, self._stages, self._stage, self._done)
        store.set(str(self.rank), json.dumps(beat))

    def _watch(self) -> None:
        store = self._store
        assert store is not None  # ``start`` has made it
        while True:
            time.sleep(_INTERVAL)
            try:
                self._publish(store)
                failed = self._failure(store) is not None
                missing = None if failed else self._gone(store) or self._missing(store, self.limit)
            except RuntimeError:
                if self._done:
                    return
                # The store is held by the launcher of the first machine, or by rank 0.
                failed, missing = False, "The first machine of the run no longer answers."
            if failed or missing:
                self._end(missing)

    def _end(self, missing: str | None) -> None:
        """End this process, unless its main thread does so by itself."""
        if missing and self.report_failure(missing):
            _show(missing)
        else:
            time.sleep(_GRACE)
            self.show_failure_elsewhere()
        logger.info("Ending, because of another process: %s", missing or self._try(self._failure))
        if self._stack_log is not None:
            faulthandler.dump_traceback(self._stack_log, all_threads=True)
        logging.shutdown()
        os._exit(1)

    def _failure(self, store: torch.distributed.Store) -> tuple[str, str] | None:
        """The machine of another process that has failed, and what it says."""
        if not store.check([_FAILED]):
            return None
        rank, host, machine, text = json.loads(store.get(_FAILED))
        return None if rank == self.rank else (machine, f"process {rank} on {host} failed: {text}")

    def _others(self, store: torch.distributed.Store) -> dict[int, tuple[Heartbeat, float]]:
        """The last heartbeat of each of the others, and when it came (seconds, this process's clock)."""
        ranks = [rank for rank in range(self.world) if rank != self.rank]
        now = time.monotonic()
        for rank, text in zip(ranks, store.multi_get([str(rank) for rank in ranks]), strict=True):
            beat = Heartbeat(*json.loads(text))
            if rank not in self._seen or self._seen[rank][0].number != beat.number:
                self._seen[rank] = (beat, now)
        return self._seen

    def _gone(self, store: torch.distributed.Store) -> str | None:
        """Name processes that have ended without a word."""
        now, host = time.monotonic(), socket.gethostname()
        gone = [
            f"process {rank} (id {beat.pid} on {beat.host}, at: {beat.stage})"
            for rank, (beat, when) in sorted(self._others(store).items())
            if not beat.done and ((beat.host == host and not _is_running(beat.pid)) or now - when > _SILENCE)
        ]
        if not gone:
            return None
        return (
            f"{' and '.join(gone)} ended without an error of its own: it was killed, perhaps because the machine ran "
            "out of memory (see dmesg there)."
        )

    def _missing(self, store: torch.distributed.Store, limit: float) -> str | None:
        """Name processes that are behind this one, when it has waited longer than the limit."""
        waited = time.monotonic() - self._since
        if waited < limit:
            return None
        behind = [
            f"process {rank} on {beat.host} is still at: {beat.stage}"
            for rank, (beat, _) in sorted(self._others(store).items())
            if beat.stages < self._stages and not beat.done
        ]
        if not behind:
            return None
        return (
            f"waited {waited:.0f} s for {len(behind)} of {self.world} processes (--ddp_timeout {self.limit:.0f}). "
            f"{'; '.join(behind)}; the others are at: {self._stage}. logs/rank<number>.log of each says where it "
            "stands. If it is only slow, raise --ddp_timeout."
        )


def _show(text: str) -> None:
    sys.stderr.write(f"\nerror: {text}\n")
    sys.stderr.flush()


def _machine() -> str:
    """The machine's number in the run, as torchrun counts."""
    return os.environ.get("GROUP_RANK", "0")


def _is_running(pid: int) -> bool:
    """Whether a process of this machine runs; one that has ended and waits for its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return not Path("/proc/self/stat").exists()  # no such file system: can't tell
    return state not in ("Z", "X")

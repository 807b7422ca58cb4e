"""Each process tells the others that it is alive and where it stands, so that none waits for ever.

A collective operation waits for all processes. When one has failed, was killed, or hangs, the others see
nothing of it: over NCCL they wait in silence, over gloo they fail with a message about a connection. So a
thread in every process publishes, in the store through which the processes found each other, how far it
has come, and looks at what the others say. The first to fail leaves its message; the rest end without one.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from minicpm_tune import processes
from minicpm_tune.logs import LOG_ONLY
from minicpm_tune.processes import gather

logger = logging.getLogger(LOG_ONLY)

_INTERVAL = 1.0  # seconds between two looks
_GRACE = 5.0  # seconds that a process whose peer failed gets to end by itself
_SILENCE = 90.0  # seconds without a sign, after which a process on another machine counts as gone


@dataclass(frozen=True)
class Sign:
    """What a process tells of itself.

    Attributes:
        host: Its machine.
        pid: Its process id there.
        beat: Goes up by one per look.
        count: Goes up by one with each stage of the work; the same on every process at the same point.
        stage: That stage, in words.
        done: It has left the work in good order.
    """

    host: str
    pid: int
    beat: int
    count: int
    stage: str
    done: bool = False


class PeerMonitor:
    """The watch of one process; with a single process in the run it watches nothing.

    Args:
        limit: Seconds to wait for others at one stage (``--ddp_timeout``).
        dump: Writes the stack of every thread of this process to its log.
    """

    def __init__(self, *, limit: float, dump: Callable[[], None] = lambda: None):
        self.limit, self.dump = limit, dump
        self.rank, self.world = 0, 1
        self._count, self._stage, self._since = 0, "starting", time.monotonic()
        self._store: torch.distributed.Store | None = None
        self._prefix, self._beat, self._done = "", 0, False
        self._seen: dict[int, tuple[Sign, float]] = {}
        self._failed_on = ""

    def start(self) -> None:
        """Start watching; every process calls it, once they have joined."""
        self.rank, self.world = processes.joined()
        if self.world == 1:
            return
        self._prefix = gather(uuid.uuid4().hex)[0]
        # A connection of its own: in a shared one, a waiting call of the main thread would hold up ours.
        self._store = torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False
        )
        self._publish()
        gather(None)
        threading.Thread(target=self._watch, name="rank watch", daemon=True).start()

    def mark(self, stage: str) -> None:
        """Say what is being done now. All processes make the same marks in the same order."""
        self._count, self._stage, self._since = self._count + 1, stage, time.monotonic()

    def finish(self) -> None:
        """Say that this process has done its work; from now on it may end without being missed."""
        self.mark("done")
        self._done = True
        if self._store is not None:
            self._try(self._publish)

    def claim(self, text: str) -> bool:
        """Leave the message of a failure.

        Args:
            text: One line, shown in the logs of the others.

        Returns:
            True for the first process that fails: it is the one to show its message on the screen.
        """
        store = self._store
        if store is None:
            return True
        mine = json.dumps([self.rank, socket.gethostname(), _machine(), text])
        kept = self._try(lambda: store.compare_set(self._key("failed"), "", mine).decode())
        return kept is None or kept == mine

    def show_elsewhere(self) -> None:
        """Show on this machine's screen, once, that a process on another machine has failed."""
        failure = self._try(self._failure) if processes.local_rank() == 0 else None
        if failure is not None and self._failed_on != _machine():
            sys.stderr.write(f"\nerror: {failure}\n")
            sys.stderr.flush()

    def reason_of_others(self, patience: float) -> str | None:
        """Why an operation with the others may have failed here: who failed, is gone, or is missing.

        Args:
            patience: Seconds to wait for a reason to show.
        """
        until = time.monotonic() + patience
        while self._store is not None:
            reason = self._try(lambda: self._failure() or self._gone() or self._missing(0.8 * self.limit))
            if reason is not None or time.monotonic() > until:
                return reason
            time.sleep(_INTERVAL / 4)
        return None

    def _key(self, name: str | int) -> str:
        return f"finetune/{self._prefix}/{name}"

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:  # all of torch.distributed's are
            logger.info("the store did not answer: %s", error)
            return None

    def _publish(self) -> None:
        assert self._store is not None  # ``start`` has made it, here and below
        self._beat += 1
        sign = Sign(socket.gethostname(), os.getpid(), self._beat, self._count, self._stage, self._done)
        self._store.set(self._key(self.rank), json.dumps(asdict(sign)))

    def _watch(self) -> None:
        while True:
            time.sleep(_INTERVAL)
            try:
                self._publish()
                failure = self._failure()
                missing = None if failure else self._gone() or self._missing(self.limit)
            except RuntimeError:
                if self._done:
                    return
                # The store is held by the launcher of the first machine, or by rank 0.
                failure, missing = None, "The first machine of the run no longer answers."
            if failure or missing:
                self._end(failure, missing)
                return

    def _end(self, failure: str | None, missing: str | None) -> None:
        """End this process, unless its main thread does so by itself."""
        if missing and self.claim(missing):
            failure = missing
            sys.stderr.write(f"\nerror: {missing}\n")
            sys.stderr.flush()
        else:
            time.sleep(_GRACE)
            self.show_elsewhere()
        logger.info("Ending, because of another process: %s", failure or missing)
        self.dump()
        logging.shutdown()
        os._exit(1)

    def _failure(self) -> str | None:
        assert self._store is not None
        if not self._store.check([self._key("failed")]):
            return None
        rank, host, self._failed_on, text = json.loads(self._store.get(self._key("failed")))
        return None if rank == self.rank else f"process {rank} on {host} failed: {text}"

    def _others(self) -> dict[int, tuple[Sign, float]]:
        """The last sign of each of the others, and when it came (seconds, this process's clock)."""
        assert self._store is not None
        ranks = [rank for rank in range(self.world) if rank != self.rank]
        now = time.monotonic()
        for rank, text in zip(ranks, self._store.multi_get([self._key(rank) for rank in ranks]), strict=True):
            sign = Sign(**json.loads(text))
            if rank not in self._seen or self._seen[rank][0].beat != sign.beat:
                self._seen[rank] = (sign, now)
        return self._seen

    def _gone(self) -> str | None:
        """Name processes that have ended without a word."""
        now, host, gone = time.monotonic(), socket.gethostname(), []
        for rank, (sign, when) in sorted(self._others().items()):
            if sign.done:
                continue
            if (sign.host == host and not _is_running(sign.pid)) or now - when > _SILENCE:
                gone.append(f"process {rank} (id {sign.pid} on {sign.host}, at: {sign.stage})")
        if not gone:
            return None
        return (
            f"{' and '.join(gone)} ended without an error of its own: it was killed, perhaps because the machine ran "
            "out of memory (see dmesg there)."
        )

    def _missing(self, limit: float) -> str | None:
        """Name processes that are behind this one, when it has waited longer than the limit."""
        waited = time.monotonic() - self._since
        if waited < limit:
            return None
        others = self._others()
        behind = {
            rank: sign for rank, (sign, _) in others.items() if sign.count < self._count and not sign.done
        }
        if not behind:
            return None
        stages = "; ".join(
            f"process {rank} on {sign.host} is still at: {sign.stage}"
            for rank, sign in sorted(behind.items())
        )
        return (
            f"waited {waited:.0f} s for {len(behind)} of {self.world} processes (--ddp_timeout {self.limit:.0f}). "
            f"{stages}; the others are at: {self._stage}. logs/rank<number>.log of each says where it stands. If it "
            "is only slow, raise --ddp_timeout."
        )


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

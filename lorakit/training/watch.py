"""Ranks that watch each other: one that dies or freezes ends the run within seconds, and leaves no process behind.

A rank that waits in a collective cannot tell a frozen rank from one that is busy for an hour with samples or a cache.
So a thread of each rank counts up a number in the launcher's store, twice a second. It goes on counting while the rank
computes, saves or waits, because such calls release Python's lock; a stopped process or a dead machine does not count.
On the same machine used processor time is a sign of life too, for the rare long call that keeps the lock.
Silence is counted in looks, not in seconds: a rank that was itself suspended does not take the others for dead.
"""

import _thread
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Self

import psutil
from torch.distributed import DistStoreError, PrefixStore, TCPStore  # type: ignore[attr-defined]

from lorakit.errors import RankError
from lorakit.training.stop import end_at_once

LOOK_EVERY = 0.5
"""Seconds between two looks."""
SILENT_LOOKS = 16
"""Looks without a sign of life after which a rank is lost: 8 seconds."""
ORPHAN_SECONDS = 10.0
"""How long ranks whose launcher is gone have to finish their step and save."""
GRACE_SECONDS = 2.0
"""How long this process has to end by itself, with an error of its own, once a rank is lost."""
_BYE, _FAILED = "bye", "failed"
_STORE_TIMEOUT = timedelta(seconds=5)


@dataclass
class Peer:
    """Another rank. ``process`` only on this machine."""

    pid: int
    host: str
    process: psutil.Process | None = None
    count: str = ""
    seconds: float = -1.0
    """Processor time used."""
    silent: int = 0
    """Looks in a row without a sign of life."""
    failed: bool = False
    """It has told an error of its own, and has ended or soon will."""

    @classmethod
    def read(cls, told: str, here: str) -> Self:
        """From what ``Watch`` told of itself. A process that has gone already is not on this machine any more."""
        pid, _, host = told.partition(" ")
        try:
            return cls(int(pid), host, psutil.Process(int(pid)) if host == here else None)
        except psutil.Error:
            return cls(int(pid), host)

    def is_gone(self) -> bool:
        """Whether its process has ended; False where that cannot be seen."""
        if self.process is None:
            return False
        try:
            return not self.process.is_running() or self.process.status() == psutil.STATUS_ZOMBIE
        except psutil.Error as error:
            return isinstance(error, psutil.NoSuchProcess)

    def look(self, count: str) -> None:
        """Count this look as silent, or not: a new ``count`` and processor time are signs of life."""
        self.failed = count == _FAILED
        if self.failed:
            self.silent += 1
            return
        if count != self.count:
            self.count, self.silent = count, 0
            return
        seconds = self._seconds()
        self.silent = 0 if seconds > self.seconds >= 0 else self.silent + 1
        self.seconds = seconds

    def kill(self) -> None:
        """End its process, where it is on this machine: one that is stopped heeds no other signal."""
        if self.process is not None:
            with suppress(psutil.Error):
                self.process.kill()

    def _seconds(self) -> float:
        try:
            return sum(self.process.cpu_times()[:2]) if self.process is not None else -1.0
        except psutil.Error:
            return -1.0


@dataclass
class Watch:
    """This rank's watching thread, from ``start`` to ``close``."""

    rank: int
    world: int
    _peers: dict[int, Peer] = field(default_factory=dict)
    _closed: threading.Event = field(default_factory=threading.Event)
    _goodbye: str = _BYE

    def start(self) -> Self:
        """Begin to count and to look; the ranks must have met, so that the launcher's store is there."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=_STORE_TIMEOUT)
        self._store = PrefixStore(f"lorakit-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self._store.set(f"who {self.rank}", f"{os.getpid()} {_here()}")
        self._thread = threading.Thread(target=self._run, name="lorakit-watch", daemon=True)
        self._thread.start()
        return self

    def is_first(self, error: str) -> bool:
        """Whether no other rank has come with the same error; for ``GRACE_SECONDS`` the others wait for rank 0."""
        key = f"error {error}"
        try:
            if self.rank > 0:
                with suppress(DistStoreError):
                    self._store.wait([key], timedelta(seconds=GRACE_SECONDS))
            return bool(self._store.compare_set(key, "", str(self.rank)) == str(self.rank).encode())
        except RuntimeError:  # the launcher is gone
            return True

    def close(self, *, failed: bool = False) -> None:
        """Take leave: a rank that ends after this is not lost. One that has ``failed`` and has told why takes with it,
        some seconds later and without a word, those that did not fail alike."""
        self._goodbye = _FAILED if failed else _BYE
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        count = 0
        try:
            self._meet()
            while not self._closed.wait(LOOK_EVERY):
                count += 1
                self._look(str(count))
            self._store.set(f"count {self.rank}", self._goodbye)
        except RuntimeError:
            if not self._closed.wait(ORPHAN_SECONDS):
                self._leave("the launcher is gone", list(self._peers.values()))

    def _meet(self) -> None:
        self._store.set(f"count {self.rank}", "0")
        others = [rank for rank in range(self.world) if rank != self.rank]
        keys = [f"{what} {rank}" for what in ("who", "count") for rank in others]
        while not self._store.check(keys) and not self._closed.wait(LOOK_EVERY):
            continue
        if not self._closed.is_set():
            here = _here()
            self._peers = {rank: Peer.read(self._store.get(f"who {rank}").decode(), here) for rank in others}

    def _look(self, count: str) -> None:
        # Who has gone is asked first: a rank says goodbye before it goes, so a goodbye is then seen.
        gone = {rank for rank, peer in self._peers.items() if peer.is_gone()}
        self._store.set(f"count {self.rank}", count)
        counts = self._store.multi_get([f"count {rank}" for rank in self._peers])
        for (rank, peer), told in zip(list(self._peers.items()), counts, strict=True):
            if told.decode() == _BYE:
                del self._peers[rank]
            else:
                peer.look(told.decode())
        gone -= {rank for rank, peer in self._peers.items() if peer.failed}
        lost = {rank: p for rank, p in self._peers.items() if rank in gone or p.silent >= SILENT_LOOKS}
        if lost:
            silent = {rank: peer for rank, peer in lost.items() if not peer.failed}
            names = [f"rank {rank} (process {peer.pid}) on {peer.host.split()[0]}" for rank, peer in silent.items()]
            quiet = not silent or any(rank not in lost and rank < self.rank for rank in self._peers)
            verb = "has ended" if gone else f"has not answered for {SILENT_LOOKS * LOOK_EVERY:.0f} seconds"
            self._leave("" if quiet else f"{', '.join(names)} {verb}", list(silent.values()))

    def _leave(self, reason: str, lost: list[Peer]) -> None:
        """End this process with RankError's code, by force if the main thread does not do it."""
        for peer in lost:
            peer.kill()
        if reason and not self._closed.is_set():
            with suppress(RuntimeError):  # beside what follows, since stderr may be held up or gone
                _thread.start_new_thread(_say, (f"lorakit: error: rank {self.rank}: {reason}",))
        time.sleep(GRACE_SECONDS)
        end_at_once(RankError.exit_code)


def _say(text: str) -> None:
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _here() -> str:
    """The host's name, and what tells this machine and its process ids from all others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()

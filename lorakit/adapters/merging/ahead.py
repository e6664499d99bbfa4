"""A file that is read in order: its next bytes read, and those that have been read hashed, by other threads."""

import hashlib
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lorakit.adapters.merging.behind import Behind
from lorakit.storage.bases import remember_digest
from lorakit.storage.direct import Bytes, DirectReader

SMALL = 1 << 20
"""After a read of less the next is not guessed."""


class Ahead:
    """A file's bytes. When they have been read in order, once and whole, its digest is remembered."""

    def __init__(self, path: Path, start: int, *, fresh: bool = False) -> None:
        """``start``: where reading begins. ``fresh``: from the disk even where the page cache has the bytes."""
        self._path, self._file = path, DirectReader(path, fresh=fresh)
        weakref.finalize(self, self._file.close)
        self._pool, self._lock = ThreadPoolExecutor(1), threading.Lock()
        self._next: tuple[int, int, Future[Bytes]] | None = None
        self._sha = hashlib.sha256(self._file.read(0, start).data)
        self._hash = Behind(self._sha.update)
        self._hashed = start

    def read(self, begin: int, end: int, limit: int | None = None) -> Bytes:
        """uint8 [end - begin], not to be written to; fewer where the file has become shorter. What comes next is
        guessed to end at ``limit``."""
        with self._lock:
            content = self._read(begin, end, self._file.size if limit is None else limit)
            if begin == self._hashed != self._file.size:
                self._hashed += len(content)
                self._hash.put(content)
                if self._hashed == self._file.size:
                    self._hash.wait()
                    remember_digest(self._path, self._sha.digest())
        return content

    def _read(self, begin: int, end: int, limit: int) -> Bytes:
        """Read what was not guessed, and guess that as much comes next."""
        place, stop, guessed = self._next or (0, 0, Future())
        known = place <= begin and end <= stop
        content = guessed.result()[begin - place : end - place] if known else self._file.read(begin, end)
        stop = min(2 * end - begin, limit)
        if end - begin >= SMALL and end < stop:
            self._next = end, stop, self._pool.submit(self._file.read, end, stop)
        return content

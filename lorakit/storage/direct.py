"""Large files read and written past the page cache, where the system can: each byte is needed once, and a page of the
cache costs more than the disk's own transfer. Where it cannot (no Linux, a file system without O_DIRECT), the cache is
used, and nothing else changes."""

import ctypes
import errno
import mmap
import os
import threading
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
ALIGN = 4096
"""Place, length and memory of a direct transfer are multiples of it: the largest block that disks ask for."""
WRITE = 8 << 20
"""Bytes that are gathered before they are written: disks behind a virtual machine take more at a time in less."""
LARGE = 1 << 20
"""From so many bytes on, a piece that is aligned is written as it is."""
KEPT = 24
"""Pieces of memory of at most WRITE bytes, and a little, that are kept to be taken again."""
_DIRECT = getattr(os, "O_DIRECT", 0)
_UNABLE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system without direct transfers says, when a file is opened or only when it is read or written."""


class DirectReader:
    """Any bytes of a file, from several threads."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        """``fresh``: from the disk even where the page cache has them."""
        self.size = path.stat().st_size
        self._handle = os.open(path, os.O_RDONLY)
        self._direct = _open_direct(path, os.O_RDONLY)
        self._cache = None if fresh or self._direct is None else _PageCache(self._handle, self.size)

    def read(self, begin: int, end: int) -> Bytes:
        """uint8 [end - begin], in memory of its own; fewer where the file has become shorter."""
        start = begin - begin % ALIGN
        room = ROOMS.take(-(-(end - start) // ALIGN) * ALIGN)
        return room[begin - start : self._read(room, start, end - start)]

    def _read(self, room: Bytes, start: int, size: int) -> int:
        """Read from ``start`` on into ``room``, in whole blocks if need be; how many of ``size`` bytes there are."""
        exact = room[:size].data
        if self._direct is None:
            return os.preadv(self._handle, [exact], start)
        if self._cache is not None and self._cache.has(start, start + size):
            return os.preadv(self._handle, [exact], start)
        try:
            return min(os.preadv(self._direct, [room.data], start), size)
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
            return os.preadv(self._handle, [exact], start)

    def close(self) -> None:
        for handle in (self._handle, self._direct):
            if handle is not None:
                os.close(handle)


class _PageCache:
    """Which bytes of a file are in the page cache. (A read that may not wait would say it too, but it makes the kernel
    fetch pages ahead, and each of them costs more than a direct transfer.)"""

    def __init__(self, handle: int, size: int) -> None:
        self._start = 0
        self._mincore = getattr(ctypes.CDLL(None), "mincore", None)
        if size and self._mincore is not None:
            try:  # never read through: a file may become shorter
                self._map = mmap.mmap(handle, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
            except OSError:
                return
            self._start = np.frombuffer(self._map, np.uint8).ctypes.data

    def has(self, begin: int, end: int) -> bool:
        if not self._start or begin >= end or self._mincore is None:
            return False
        first = begin - begin % mmap.PAGESIZE
        pages = ctypes.create_string_buffer(-(-(end - first) // mmap.PAGESIZE))
        place, count = ctypes.c_void_p(self._start + first), ctypes.c_size_t(end - first)
        return self._mincore(place, count, pages) == 0 and all(page & 1 for page in pages.raw)


class DirectWriter:
    """A new file, written in order. What it has is on its way to the disk, and on it after an fsync."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._direct = _open_direct(path, os.O_WRONLY)
        self._room, self._filled, self._place = ROOMS.take(WRITE), 0, 0

    def write(self, content: Bytes) -> None:
        """Raises OSError when the disk refuses this or what came before."""
        aligned = not (self._filled % ALIGN or len(content) % ALIGN or content.ctypes.data % ALIGN)
        if aligned and len(content) >= LARGE:
            self.finish()
            self._send(content.data)
            return
        while len(content):
            fits = content[: WRITE - self._filled]
            self._room[self._filled : self._filled + len(fits)] = fits
            self._filled += len(fits)
            content = content[len(fits) :]
            if self._filled == WRITE:
                self.finish()

    def finish(self) -> None:
        """Write what is left. Raises OSError when the disk refuses."""
        content, self._filled = self._room[: self._filled].data, 0
        self._send(content)

    def _send(self, content: memoryview) -> None:
        while content:
            whole = len(content) - len(content) % ALIGN
            direct = self._direct if whole else None
            try:
                if direct is None:
                    count = os.pwrite(self._handle, content, self._place)
                else:
                    count = os.pwrite(direct, content[:whole], self._place)
            except OSError as error:
                if direct is None or error.errno not in _UNABLE:
                    raise
                os.close(direct)  # a file system that will not, or a limit amid a block: the cache's way says which
                self._direct = None
                continue
            self._place += count
            content = content[count:]

    def close(self) -> None:
        for handle in (self._handle, self._direct):
            if handle is not None:
                os.close(handle)


def _open_direct(path: Path, flags: int) -> int | None:
    """A handle for transfers past the page cache, if the file system has them."""
    if not _DIRECT:
        return None
    try:
        return os.open(path, flags | _DIRECT)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
        return None


class Rooms:
    """Memory that is taken again once nobody has a view of it: new pages cost more than reading into old ones."""

    def __init__(self) -> None:
        self._kept: list[tuple[mmap.mmap, weakref.ref[Bytes]]] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> Bytes:
        """uint8 [size], aligned."""
        whole = (1 << max(size - _AROUND - 1, 0).bit_length()) + _AROUND
        with self._lock:
            for number, (pages, last) in enumerate(self._kept):
                if len(pages) == whole and last() is None:
                    owner = np.frombuffer(pages, np.uint8)
                    self._kept[number] = pages, weakref.ref(owner)
                    return owner[:size]
            # Pages of its own: malloc would keep them when nobody needs them any more.
            pages = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            owner = np.frombuffer(pages, np.uint8)  # which every view of it keeps alive
            if size <= WRITE + _AROUND:
                self._kept = [*self._kept[1 - KEPT :], (pages, weakref.ref(owner))]
            return owner[:size]

    def release(self) -> None:
        """Give back to the system what nobody has a view of, and the rest as soon as that is so."""
        with self._lock:
            self._kept = []


ROOMS = Rooms()
"""For all readers and writers together."""

_AROUND = 2 * ALIGN
"""What a transfer in whole blocks may have before and behind what was asked for."""

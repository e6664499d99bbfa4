"""The page cache told what a large file needs: its next bytes read before they are asked for, and what was written
sent to the disk at once, so that a flush has little left to wait for. Where a system cannot, nothing happens."""

import ctypes
import errno
import os
import sys
from pathlib import Path

STEP = 8 << 20
"""Bytes that are sent to the disk at a time."""
LAG = 8
"""Steps that may be on their way to the disk."""
_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4
_library = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
"""The C library, for ``sync_file_range``, which is Linux's and not in Python's ``os``."""


def open_in_order(path: Path) -> int:
    """Open a file to be read from its start to its end, so that the system reads far ahead; the handle."""
    handle = os.open(path, os.O_RDONLY)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return handle


def drop(handle: int, end: int) -> None:
    """Bytes up to ``end`` will not be read again soon: their memory, rather than new, is for what follows.

    From the start on, since a part of a large page stays.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, end, os.POSIX_FADV_DONTNEED)


class Early:
    """Sends a file that is written in order to the disk, and forgets it there, a few steps behind."""

    def __init__(self, handle: int) -> None:
        self._handle, self._sent = handle, 0

    def wrote(self, end: int) -> None:
        """The file has been written up to ``end``. Waits for what was sent ``LAG`` steps before: the disk's pace.

        Raises OSError when the disk refuses what was sent.
        """
        while _library is not None and end - self._sent >= STEP:
            _sync(self._handle, self._sent, _WRITE)
            done = self._sent - LAG * STEP
            if done >= 0:
                _sync(self._handle, done, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
                drop(self._handle, done + STEP)
            self._sent += STEP


def _sync(handle: int, place: int, flags: int) -> None:
    """An error must be raised here: a later fsync does not tell it again."""
    assert _library is not None
    if _library.sync_file_range(handle, ctypes.c_int64(place), ctypes.c_int64(STEP), flags):
        number = ctypes.get_errno()
        if number not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(number, os.strerror(number))

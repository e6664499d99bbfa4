"""Whether a file is still the one that it was: what is trained on must not change while it is read."""

import os
from typing import NamedTuple

from lorakit.errors import DataError


class Stamp(NamedTuple):
    """What tells that a file is still the same one: its number, size, and time of change in nanoseconds."""

    inode: int
    size: int
    changed: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)

    def check(self, now: os.stat_result, where: str) -> None:
        """Raises DataError when the file is no longer the one that was stamped."""
        if Stamp.of(now) != self:
            raise DataError("changed while it was read", where=where, hint="start again when nothing writes to it")

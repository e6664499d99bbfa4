"""What the operating system says of places on its disks, whatever they are called there."""

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from lorakit.errors import ConflictError


def lies_in(path: Path | str, folder: Path | str) -> bool:
    """Whether ``path``, which need not exist, is ``folder`` or below it: links, bind mounts and disks that do not tell
    upper from lower case give one place several names.
    """
    place, outer = (Path(os.path.realpath(one)) for one in (path, folder))
    above = (place, *place.parents)
    return outer in above or any(_same(one, outer) for one in above)


def check_apart(out: Path, inputs: Iterable[tuple[str, Path]]) -> None:
    """ConflictError when ``out`` is, holds or is inside one of the ``inputs``, each with what it is."""
    for name, path in inputs:
        if lies_in(out, path) or lies_in(path, out):
            raise ConflictError(f"OUT is the {name}, lies inside it or contains it", where=str(out))


def _same(one: Path, other: Path) -> bool:
    with suppress(OSError):  # not there
        found = os.stat(one), os.stat(other)
        return found[0].st_ino != 0 and os.path.samestat(*found)
    return False


def standing(path: Path) -> Path:
    """``path``, or the folder above it that there is."""
    return next(one for one in (path, *path.absolute().parents) if os.path.exists(one))


def free_bytes(path: Path) -> int | None:
    """What is free on the disk of ``path``, or of the folder that it would be made in; None where the disk does not
    say, as some networks' do not.
    """
    with suppress(OSError):
        usage = shutil.disk_usage(standing(path))
        return usage.free if usage.total else None
    return None

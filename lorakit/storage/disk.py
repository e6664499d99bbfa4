"""The disk that everything is written to: its errors as lorakit's, and flushing what it holds."""

import errno
import os
import re
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorakit.errors import DISK_ERRORS, ConflictError, ResourceError

NO_SUCH_CALL = frozenset({errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK})
"""How a file system says that it cannot flush a folder, or has no locks."""


@contextmanager
def disk_errors(where: Path | None = None) -> Iterator[None]:
    """Turn a full, read-only or failing disk into ResourceError; other exceptions pass unchanged."""
    try:
        yield
    except Exception as error:
        number = os_error(error)
        if number is None or number not in DISK_ERRORS:
            raise
        place = where or getattr(error, "filename", None) or ""
        reason = f"cannot write: {os.strerror(number)}"
        raise ResourceError(reason, where=str(place), hint=DISK_ERRORS[number]) from error


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """A file that cannot be read, although it is there, is a ResourceError: that says nothing of what is in it."""
    try:
        yield
    except Exception as error:
        number = os_error(error)
        if number in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG):
            raise
        hint = "go on when it can be read; or take it away, if it never will be"
        raise ResourceError(f"cannot be read: {os.strerror(number)}", where=str(path), hint=hint) from error


def check_name(path: Path) -> None:
    """ResourceError for a name that is too long for the file system."""
    with disk_errors(path), suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(path)


def open_more_files() -> None:
    """Let this process have as many files open at once as the system allows: models come in hundreds of shards."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # some systems allow less than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def os_error(error: Exception) -> int | None:
    """The number of an operating system's error; libraries in Rust have it in their text: ``... (os error 28)``."""
    told = re.search(r"\(os error (\d+)\)", str(error))
    return error.errno if isinstance(error, OSError) else int(told[1]) if told else None


def fsync(path: Path) -> None:
    """Flush one file or folder to the disk, where its file system can."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fsync_handle(handle)
    finally:
        os.close(handle)


def fsync_handle(handle: int) -> None:
    """``fsync`` of an open file or folder."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SUCH_CALL:
            raise


def make_folder(folder: Path) -> None:
    """Make a folder and what is missing above it, flushed, so that what is put in it later cannot vanish with it."""
    if not folder.is_dir():
        make_folder(folder.parent)
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError as error:
            raise ConflictError("a file, where a folder is needed", where=str(folder)) from error
        fsync(folder.parent)


def check_takes_files(folder: Path) -> None:
    """Raises ResourceError when no file can be made in ``folder``."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise takes_no_file(folder, error) from error


def takes_no_file(folder: Path, error: OSError) -> ResourceError:
    """What is said of a folder that a file could not be made in; the kernel's own say that they are not there."""
    reason = f"cannot be written ({error.strerror})"
    if isinstance(error, FileNotFoundError):
        reason = "takes no new files"
    return ResourceError(reason, where=str(folder), hint="choose a folder that can be written")


def files_below(folder: Path) -> list[tuple[str, Path]]:
    """Each file below the folder as (path relative to it with ``/``, path); linked folders count as files."""
    found = []
    for below, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(below) / name).is_symlink()]
        found += [Path(below) / name for name in [*files, *links]]
    return sorted((path.relative_to(folder).as_posix(), path) for path in found)

"""Files and folders that are absent or complete, whatever stops the process or the machine.

Everything is written beside its final place under a name that starts with ``.tmp-``, flushed to the disk, and renamed.
Whoever writes to a place first removes what a killed process left beside it. A folder can carry ``manifest.json``.
"""

import ctypes
import errno
import fcntl
import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorakit.errors import ConflictError
from lorakit.storage.disk import NO_SUCH_CALL, disk_errors, files_below, fsync, fsync_handle, make_folder, takes_no_file
from lorakit.storage.manifest import write_manifest

TMP = ".tmp-"
OLD = ".old-"
SHORT = 200
"""Bytes."""
log = logging.getLogger("lorakit")


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` in one step; ResourceError when the disk refuses."""
    with disk_errors(path):
        with beside(path, folder=False) as partial:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                fsync_handle(file.fileno())
            _allow(partial, 0o666)
            os.replace(partial, path)
        fsync(path.parent)


def write_text(path: Path, content: str) -> None:
    """``write_bytes`` in UTF-8."""
    write_bytes(path, content.encode())


@contextmanager
def new_folder(final: Path, *, manifest: bool, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside ``final`` that takes its place, complete and flushed, when the block ends well.

    An error in the block removes it. ``manifest`` adds manifest.json. A ``final`` that exists is a ConflictError
    unless ``replace`` is set; it then changes places with the new one, and is removed: in one step where the file
    system can, else in two, of which ``sweep_killed`` takes the first back when there is no second. ResourceError when
    the disk refuses.
    """
    if not replace and os.path.lexists(final):
        raise _exists(final)
    with disk_errors(final):
        make_folder(final.parent)
        with beside(final, folder=True) as folder:
            yield folder
            _allow(folder, 0o777)
            _flush(folder, manifest)
            if not (replace and os.path.lexists(final)):
                _take_free_place(folder, final)
            elif not _exchange(folder, final):
                with _out_of_the_way(final):
                    os.rename(folder, final)
                    fsync(final.parent)
        fsync(final.parent)
        _try_to_remove(folder)


def _take_free_place(folder: Path, final: Path) -> None:
    try:
        os.rename(folder, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise _exists(final) from error


def _exists(final: Path) -> ConflictError:
    return ConflictError("exists already", where=str(final), hint="choose another name, or remove it")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is in this block for ``folder``, which is made if need be.

    A file system without locks on folders lets all of them in at once.
    """
    with disk_errors(folder):
        make_folder(folder)
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_SUCH_CALL:
                raise
        yield
    finally:
        os.close(handle)


@contextmanager
def new_file(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield the path of an empty file beside ``final`` that takes its place, flushed, when the block ends well.

    An error in the block removes it. Raises as ``new_folder``.
    """
    if not replace and os.path.lexists(final):
        raise _exists(final)
    with disk_errors(final):
        make_folder(final.parent)
        with beside(final, folder=False, suffix=final.suffix) as path:
            yield path
            fsync(path)
            _allow(path, 0o666)
            os.replace(path, final)
        fsync(final.parent)


@contextmanager
def beside(final: Path, *, folder: bool, suffix: str = "") -> Iterator[Path]:
    """A new and empty file or folder beside ``final``, locked against ``sweep_killed``; an error removes it.

    What processes that were killed left of their own is removed first.
    """
    sweep_killed(final)
    path, held = _made(TMP, final, folder=folder, suffix=suffix)
    try:
        yield path
    except BaseException:
        with suppress(OSError):
            _remove(path)
        raise
    finally:
        os.close(held)


def _made(prefix: str, final: Path, *, folder: bool, suffix: str = "") -> tuple[Path, int]:
    """A new file or folder beside ``final``, and its handle, which holds a lock on it until it is closed."""
    while True:
        try:
            if folder:
                path = Path(tempfile.mkdtemp(prefix=f"{prefix}{_short(final)}-", dir=final.parent))
            else:
                handle, name = tempfile.mkstemp(prefix=f"{prefix}{_short(final)}-", suffix=suffix, dir=final.parent)
                os.close(handle)
                path = Path(name)
        except FileNotFoundError as error:
            raise takes_no_file(final.parent, error) from error
        held = _hold(path)
        if held is not None:
            return path, held


def _short(final: Path) -> str:
    """So much of a name that a file system's 255 bytes hold more beside it."""
    whole = os.fsencode(final.name)
    return final.name if len(whole) <= SHORT else whole[:SHORT].decode(errors="ignore")


def discard(path: Path) -> None:
    """Remove a file or folder so that no half-removed one is ever seen under its name.

    What an overlay has from a lower layer has no other name to take, and is removed where it is. What somebody else has
    open, a network's file system keeps until then under ``.tmp-*``.
    """
    aside = Path(tempfile.mkdtemp(prefix=f"{TMP}{_short(path)}-", dir=path.parent))
    try:
        os.rename(path, aside / path.name)
    except OSError as error:
        os.rmdir(aside)
        if error.errno != errno.EXDEV:
            raise
        _remove(path)
    else:
        _try_to_remove(aside)


@contextmanager
def _out_of_the_way(final: Path) -> Iterator[None]:
    """``final`` has another name in the block, and is removed after it; an error brings it back."""
    aside, held = _made(OLD, final, folder=True)
    try:
        try:
            os.rename(final, aside / final.name)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _remove(final)  # as in ``discard``
        yield
    finally:
        with suppress(OSError):
            _bring_back(aside, final)
        os.close(held)


def _bring_back(aside: Path, final: Path) -> None:
    """End ``_out_of_the_way``: what was ``final`` is so again, unless something else is, and removed then."""
    earlier = aside / final.name
    if os.path.lexists(earlier) and not os.path.lexists(final):
        os.rename(earlier, final)
    _remove(earlier)
    os.rmdir(aside)  # not empty, when it is of another place whose name begins as this one's


def sweep(folder: Path) -> None:
    """Remove the ``.tmp-*`` that a killed process left directly in ``folder``; links are removed, not followed."""
    if not folder.is_dir():
        return
    for path in folder.glob(f"{TMP}*"):
        _try_to_remove(path)


def sweep_killed(final: Path) -> None:
    """Remove what was being written to ``final`` when its process was killed, and bring back what stood there, if
    nothing else does; links are left alone.

    What a living process is writing there, it holds a lock on. On a file system without locks (NFS has none on folders)
    nothing is removed, but named in a warning.
    """
    for prefix, finish in ((OLD, lambda path: _bring_back(path, final)), (TMP, _remove)):
        for path in final.parent.glob(f"{prefix}{glob.escape(_short(final))}-*"):
            if path.is_symlink():
                continue
            with suppress(OSError):  # swept by somebody else
                handle = os.open(path, os.O_RDONLY)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    finish(path)
                except OSError as error:
                    if error.errno in NO_SUCH_CALL:
                        log.warning("%s: of a killed process, if nobody is writing there: this disk has no locks", path)
                finally:
                    os.close(handle)


def _hold(path: Path) -> int | None:
    """Open and lock a new file or folder for as long as it is open; None when it was swept before that."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_EX)
    if os.path.lexists(path):
        return handle
    os.close(handle)
    return None


def _exchange(one: Path, other: Path) -> bool:
    """Let two entries of a folder change places in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    at_working_folder, rename_exchange = -100, 2
    paths = at_working_folder, os.fsencode(one), at_working_folder, os.fsencode(other)
    return renameat2 is not None and renameat2(*paths, rename_exchange) == 0


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _try_to_remove(path: Path) -> None:
    """``_remove``, or some of it: a file that somebody has open keeps its folder on a network's file system."""
    with suppress(OSError):
        _remove(path)


def _flush(folder: Path, manifest: bool) -> None:
    """fsync every file, then the manifest, then every folder, deepest first."""
    for name, path in files_below(folder):
        if path.is_symlink():
            raise ConflictError("a symbolic link in a folder that should stand alone", where=name)
        fsync(path)
    if manifest:
        write_manifest(folder)
    for below, _, _ in os.walk(folder, topdown=False):
        fsync(Path(below))


def _allow(path: Path, mode: int) -> None:
    """The mode that a new file or folder has, which ``tempfile`` keeps from others; some file systems have none."""
    mask = os.umask(0)
    os.umask(mask)
    with suppress(OSError):
        os.chmod(path, mode & ~mask)

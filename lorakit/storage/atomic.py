"""Files and folders that are absent or complete, whatever stops the process or the machine.

Everything is written beside its final place under a name that starts with ``.tmp-``, flushed to the disk, and renamed.
Whoever writes to a place first removes what a killed process left beside it. A folder can carry ``manifest.json``: the
SHA-256 and the size of each file, written last.
"""

import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lorakit.errors import DISK_ERRORS, CheckpointError, ConflictError, ResourceError

MANIFEST = "manifest.json"
TMP = ".tmp-"
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def disk_errors(where: Path | None = None) -> Iterator[None]:
    """Turn a full, read-only or failing disk into ResourceError; other exceptions pass unchanged.

    Libraries written in Rust put the error's number into their message only: ``... (os error 28)``.
    """
    try:
        yield
    except Exception as error:
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if number not in DISK_ERRORS | _FORBIDDEN:
            raise
        forbidden = number in _FORBIDDEN
        hint = "choose a folder that can be written" if forbidden else "free some space, or write elsewhere"
        place = where or getattr(error, "filename", None) or ""
        raise ResourceError(f"cannot write: {os.strerror(number)}", where=str(place), hint=hint) from error


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex. A symbolic link is refused (OSError)."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` in one step; ResourceError when the disk refuses."""
    with disk_errors(path):
        with _beside(path, folder=False) as partial:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(partial, 0o666 & ~_umask())
            os.replace(partial, path)
        fsync(path.parent)


def write_text(path: Path, content: str) -> None:
    """``write_bytes`` in UTF-8."""
    write_bytes(path, content.encode())


@contextmanager
def new_folder(final: Path, *, manifest: bool, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside ``final`` that takes its place, complete and flushed, when the block ends well.

    An error in the block removes it. ``manifest`` adds manifest.json. A ``final`` that exists is a ConflictError
    unless ``replace`` is set; it then changes places with the new one in one step, and is removed.
    ResourceError when the disk refuses.
    """
    if not replace and os.path.lexists(final):
        raise ConflictError("exists already", where=str(final), hint="choose another name, or remove it")
    with disk_errors(final):
        make_folder(final.parent)
        with _beside(final, folder=True) as folder:
            yield folder
            os.chmod(folder, 0o777 & ~_umask())
            _flush(folder, manifest)
            there = replace and os.path.lexists(final)
            if not (there and _exchange(folder, final)):
                if there:
                    discard(final)
                os.rename(folder, final)
        fsync(final.parent)
        _remove(folder)


def make_folder(folder: Path) -> None:
    """Make a folder and what is missing above it, flushed, so that what is put in it later cannot vanish with it."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync(folder.parent)


@contextmanager
def new_file(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield the path of an empty file beside ``final`` that takes its place, flushed, when the block ends well.

    An error in the block removes it. Raises as ``new_folder``.
    """
    if not replace and os.path.lexists(final):
        raise ConflictError("exists already", where=str(final), hint="choose another name, or remove it")
    with disk_errors(final):
        make_folder(final.parent)
        with _beside(final, folder=False, suffix=final.suffix) as path:
            yield path
            fsync(path)
            os.chmod(path, 0o666 & ~_umask())
            os.replace(path, final)
        fsync(final.parent)


@contextmanager
def _beside(final: Path, *, folder: bool, suffix: str = "") -> Iterator[Path]:
    """A new and empty file or folder beside ``final``, locked against ``sweep_killed``; an error removes it."""
    sweep_killed(final)
    held = None
    while held is None:
        if folder:
            path = Path(tempfile.mkdtemp(prefix=f"{TMP}{final.name}-", dir=final.parent))
        else:
            handle, name = tempfile.mkstemp(prefix=f"{TMP}{final.name}-", suffix=suffix, dir=final.parent)
            os.close(handle)
            path = Path(name)
        held = _hold(path)
    try:
        yield path
    except BaseException:
        with suppress(OSError):
            _remove(path)
        raise
    finally:
        os.close(held)


def check_manifest(folder: Path) -> None:
    """Compare each file with manifest.json; CheckpointError naming the first that is missing, changed or unlisted.

    The manifest itself must be what this module writes, byte for byte: a changed space in it counts as damage too.
    """
    try:
        written = (folder / MANIFEST).read_bytes()
        listed = json.loads(written)["files"]
        expected = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in listed.items()}
        if written != _manifest(listed):
            raise ValueError("not as it was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("the manifest is missing or cannot be read", where=str(folder / MANIFEST)) from error
    present = {name: path for name, path in _files(folder) if name != MANIFEST}
    for name in sorted(expected.keys() ^ present.keys()):
        reason = "is missing" if name in expected else "is not in the manifest"
        raise CheckpointError(f"a file {reason}", where=str(folder / name))
    for name, (size, digest) in expected.items():
        path = present[name]
        if path.is_symlink() or path.stat().st_size != size or sha256(path) != digest:
            raise CheckpointError("the file differs from its manifest", where=str(path))


def discard(path: Path) -> None:
    """Remove a file or folder so that no half-removed one is ever seen under its name."""
    aside = Path(tempfile.mkdtemp(prefix=f"{TMP}{path.name}-", dir=path.parent))
    os.rename(path, aside / path.name)
    _remove(aside)


def sweep(folder: Path) -> None:
    """Remove the ``.tmp-*`` that a killed process left directly in ``folder``; links are removed, not followed."""
    if not folder.is_dir():
        return
    for path in folder.glob(f"{TMP}*"):
        _remove(path)


def sweep_killed(final: Path) -> None:
    """Remove what was being written to ``final`` when its process was killed; links are left alone.

    What a living process is writing there, it holds a lock on. On a file system without locks nothing is removed.
    """
    for path in final.parent.glob(f"{TMP}{glob.escape(final.name)}-*"):
        if path.is_symlink():
            continue
        with suppress(OSError):  # in use, or swept by somebody else
            handle = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
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


def fsync(path: Path) -> None:
    """Flush one file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


def _flush(folder: Path, manifest: bool) -> None:
    """fsync every file, then the manifest, then every folder, deepest first."""
    entries = {}
    for name, path in _files(folder):
        if path.is_symlink():
            raise ConflictError("a symbolic link in a folder that should stand alone", where=name)
        fsync(path)
        if manifest:
            entries[name] = {"sha256": sha256(path), "size": path.stat().st_size}
    if manifest:
        (folder / MANIFEST).write_bytes(_manifest(entries))
        fsync(folder / MANIFEST)
    for below, _, _ in os.walk(folder, topdown=False):
        fsync(Path(below))


def _manifest(entries: Mapping[str, object]) -> bytes:
    return (json.dumps({"version": 1, "files": entries}, indent=1) + "\n").encode()


def _files(folder: Path) -> list[tuple[str, Path]]:
    """Each file below the folder as (path relative to it with ``/``, path); linked folders count as files."""
    found = []
    for below, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(below) / name).is_symlink()]
        found += [Path(below) / name for name in [*files, *links]]
    return sorted((path.relative_to(folder).as_posix(), path) for path in found)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""The layout of a run folder, and the lock that keeps a second run out of it."""

import errno
import fcntl
import logging
import os
import re
import socket
from pathlib import Path
from typing import Self

from lorakit.errors import ConflictError, RecipeError
from lorakit.storage import atomic, disk

log = logging.getLogger("lorakit")


class RunFolder:
    """``runs/NAME`` with everything that a run leaves. Rank 0 holds its lock from opening to ``close``.

    Other ranks, which make one without opening it, only compute paths.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipe = root / "recipe.yaml"
        self.data = root / "data.json"
        self.checkpoints = root / "checkpoints"
        self.metrics = root / "metrics.jsonl"
        self.loss_png = root / "loss.png"
        self.tracking = root / "tracking"
        self._lock_path = root / ".lock"
        self._lock: int | None = None

    @classmethod
    def open_new(cls, root: Path) -> Self:
        """Make the folder and lock it; ConflictError when it holds anything already or another run has it."""
        run = cls(root)
        with disk.disk_errors(root):
            disk.make_folder(root)
            run._take_lock()
        if any(not p.name.startswith(atomic.TMP) and p != run._lock_path for p in root.iterdir()):
            run.close()
            hint = "continue that run with --resume, or give another output.name"
            raise ConflictError("the run folder is not empty", where=str(root), hint=hint)
        atomic.sweep(root)
        return run

    @classmethod
    def open_existing(cls, root: Path) -> Self:
        """Lock an earlier run's folder and sweep its ``.tmp-*``; RecipeError when there is none."""
        run = cls(root)
        if not root.is_dir():
            raise RecipeError("there is no run to resume", where=str(root), hint="start it without --resume")
        with disk.disk_errors(root):
            run._take_lock()
            for folder in (root, run.checkpoints, root / "samples"):
                atomic.sweep(folder)
        return run

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after ``step`` updates."""
        return self.checkpoints / f"step-{step:06d}"

    def saved(self) -> list[tuple[int, Path]]:
        """Every checkpoint, sound or not, as (step, folder) in the order of steps."""
        found = self.checkpoints.iterdir() if self.checkpoints.is_dir() else []
        named = [(re.fullmatch(r"step-(\d{6,})", path.name), path) for path in found if path.is_dir()]
        return sorted((int(match[1]), path) for match, path in named if match)

    def samples(self, step: int) -> Path:
        """The folder of the samples made after ``step`` updates."""
        return self.root / "samples" / f"step-{step:06d}"

    def close(self) -> None:
        """Let the lock go; a second call does nothing."""
        if self._lock is not None:
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_lock(self) -> None:
        """The kernel drops a dead process's lock, so only a living run conflicts; what a dead one wrote is overwritten.

        A run that ends unlinks its lock file, perhaps between our opening and locking it: then we try the new one.
        """
        while True:
            handle = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                self._lock_file(handle)
                if self._is_current(handle):
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                    self._lock = handle
                    return
            except OSError as error:
                process = os.pread(handle, 100, 0).decode(errors="replace").strip()
                os.close(handle)
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                reason = f"another run (process {process}) is using this folder"
                hint = "wait for it, stop it, or give another output.name"
                raise ConflictError(reason, where=str(self.root), hint=hint) from error
            os.close(handle)

    def _lock_file(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in disk.NO_SUCH_CALL:
                raise
            log.warning("%s: this file system has no locks: nothing keeps a second run out of the folder", self.root)

    def _is_current(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self._lock_path, follow_symlinks=False))
        except FileNotFoundError:
            return False

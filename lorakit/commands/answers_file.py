"""The file that answers are added to, a line of JSON each, and beside it what all of them were made with."""

import errno
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from lorakit.errors import ConflictError
from lorakit.storage.atomic import alone, write_text
from lorakit.storage.disk import NO_SUCH_CALL, disk_errors, fsync_handle


class Answers:
    """Answers to be added to ``path``, which is made with the first. Nobody else adds to it until ``close``, where the
    file system has locks. ResourceError when the disk refuses."""

    def __init__(self, path: Path, made_with: Mapping[str, Any]) -> None:
        self.path, self._made_with = path, made_with
        self._settings = path.with_name(f"{path.name}.settings.json")
        self._handle: int | None = None

    def __enter__(self) -> Self:
        """Raises ConflictError where another's file is in the place of the settings."""
        if os.path.lexists(self._settings) and not self._are_ours():
            raise ConflictError("exists already", where=str(self._settings), hint="give another --out")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def unanswered(self, prompts: list[str]) -> list[str]:
        """The prompts after those that the file has answers to; a line that was cut off is removed.

        ConflictError when it holds anything but answers to the first of the prompts, made with the same, or another
        process is adding to it.
        """
        if not os.path.lexists(self.path):
            return prompts
        conflict = self._conflict("holds other than the answers to these prompts")
        if self.path.is_symlink() or not self.path.is_file():
            raise conflict
        self._check_settings()
        self._open(os.O_RDWR)
        whole = self.path.read_bytes().rpartition(b"\n")[0].splitlines(keepends=True)
        try:
            answered = [json.loads(line)["prompt"] for line in whole]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise conflict from error
        if answered != prompts[: len(answered)]:
            raise conflict
        size = sum(map(len, whole))
        with disk_errors(self.path):
            os.truncate(self.path, size + 1 if size else 0)
        return prompts[len(answered) :]

    def add(self, prompt: str, answer: str) -> None:
        """Add a line, flushed. ConflictError when the first finds a file that was not there before."""
        if self._handle is None:
            with alone(self.path.parent):
                if os.path.lexists(self.path):
                    raise self._conflict("exists already")
                write_text(self._settings, json.dumps(self._made_with, ensure_ascii=False, indent=1) + "\n")
                self._open(os.O_RDWR | os.O_CREAT | os.O_EXCL)
        assert self._handle is not None
        line = json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) + "\n"
        with disk_errors(self.path), os.fdopen(os.dup(self._handle), "ab") as file:
            file.write(line.encode())
            file.flush()
            fsync_handle(file.fileno())

    def _open(self, flags: int) -> None:
        with disk_errors(self.path):
            self._handle = os.open(self.path, flags | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise self._conflict("another process is adding to it") from error
            if error.errno not in NO_SUCH_CALL:
                raise

    def _are_ours(self) -> bool:
        if self._settings.is_symlink():
            return False
        try:
            return {*json.loads(self._settings.read_bytes())} >= {"adapters", "precision", "seed"}
        except (OSError, ValueError, TypeError, RecursionError):
            return False

    def _check_settings(self) -> None:
        try:
            earlier = json.loads(self._settings.read_bytes())
            changed = [name for name in self._made_with if earlier[name] != self._made_with[name]]
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise self._conflict(f"how its answers were made is not to be read from {self._settings.name}") from error
        if changed:
            reason = f"its answers were made with another {' and '.join(changed)}"
            raise ConflictError(reason, where=str(self.path), hint="give what they were made with, or another --out")

    def _conflict(self, reason: str) -> ConflictError:
        return ConflictError(reason, where=str(self.path), hint="give another --out")

"""A content-addressed cache of tensors on disk: what was computed once from equal inputs is read again.

An entry's name is a hash of everything it was computed from, so an edited picture, caption or model never meets an old
entry. An entry is one safetensors file with a checksum of its tensors, written aside and renamed into place.
"""

import errno
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, uint8

from lorakit.errors import DataError, ResourceError

logger = logging.getLogger("lorakit")
TMP = ".tmp-"
DAY = 86400
"""Seconds."""


def default_folder() -> Path:
    """``$LORAKIT_CACHE``, or ``~/.cache/lorakit``. ResourceError where nobody knows a home."""
    given = os.environ.get("LORAKIT_CACHE")
    try:
        return Path(given) if given else Path.home() / ".cache" / "lorakit"
    except RuntimeError as error:
        reason = "there is no home folder to keep the cache in"
        raise ResourceError(reason, hint="set LORAKIT_CACHE to a folder that can be written") from error


def content_key(*parts: str | int | float | bytes) -> str:
    """SHA-256 over the parts, types and lengths included, so that no two lists of parts run into one another."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(f"{type(part).__name__} {len(data)} ".encode() + data)
    return digest.hexdigest()


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.cpu().flatten().view(uint8).numpy().data)
    return digest.hexdigest()


def versions(*libraries: str) -> str:
    """Their versions as a part of a key."""
    return " ".join(f"{library} {version(library)}" for library in libraries)


class TensorCache:
    """Entries of one kind below ``folder``; safe for several processes at once, each writing whole files only. What a
    killed process left half-written is removed after a day."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for partial in folder.glob(f"*/{TMP}*"):
            with suppress(OSError):  # another process may remove it too
                if partial.stat().st_mtime < time.time() - DAY:
                    partial.unlink()

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def holds(self, key: str) -> bool:
        """Whether there is a sound entry; a damaged one is removed, with a warning, so that it is made anew."""
        path = self.path(key)
        try:
            path.open("rb").close()  # whose errors say more than those of safetensors
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                sound = (file.metadata() or {}).get("sha256") == checksum(tensors)
        except FileNotFoundError:
            return False
        except (SafetensorError, OSError) as error:
            logger.warning("%s: the cache entry cannot be read and is made anew: %s", path, error)
            sound = False
        else:
            if not sound:
                logger.warning("%s: the cache entry is damaged and is made anew", path)
        if not sound:
            with suppress(OSError):  # of somebody else's
                path.unlink()
        return sound

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of an entry by memory map. Raises: DataError when the entry has gone since ``holds``."""
        path = self.path(key)
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            hint = "start again: the cache is then filled anew"
            raise DataError(
                f"a cache entry vanished or changed during the run: {error}", where=str(path), hint=hint
            ) from error

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store an entry. Raises: ResourceError when the disk is full or the folder cannot be written."""
        path = self.path(key)
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        partial = path.parent / f"{TMP}{os.getpid()}-{secrets.token_hex(4)}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_bytes(save(plain, metadata={"sha256": checksum(plain)}))
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            hint = "free some space" if full else "set LORAKIT_CACHE to a folder that can be written"
            reason = f"the cache cannot be written: {error.strerror}"
            raise ResourceError(reason, where=str(path.parent), hint=hint) from error

    def offer(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """``write``, where the entry only saves time: that it cannot be written is a warning."""
        try:
            self.write(key, tensors)
        except ResourceError as error:
            logger.warning("%s", error)


def remembered(kind: str, key: str, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, a JSON value, made once for equal keys of a kind."""
    cache = TensorCache(default_folder() / kind)
    if not cache.holds(key):
        text = json.dumps(make())
        cache.offer(key, {"json": torch.frombuffer(bytearray(text.encode()), dtype=uint8)})
        return json.loads(text)
    return json.loads(cache.read(key)["json"].numpy().tobytes())

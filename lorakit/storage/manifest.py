"""``manifest.json``: the SHA-256 and the size of each file of a folder, written last."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from lorakit.errors import CheckpointError
from lorakit.storage.disk import files_below, fsync, read_errors

MANIFEST = "manifest.json"
_UNLISTED = {"Thumbs.db", "desktop.ini", "@eaDir"}
"""What programs that show folders leave in them, beside files whose names begin with a dot."""


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex. A symbolic link is refused (OSError)."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Write the manifest of a folder that has none, and flush it."""
    entries = {name: {"sha256": sha256(path), "size": path.stat().st_size} for name, path in files_below(folder)}
    (folder / MANIFEST).write_bytes(_written(entries))
    fsync(folder / MANIFEST)


def check_manifest(folder: Path) -> None:
    """Compare each file with manifest.json; CheckpointError naming the first that is missing, changed or unlisted.

    The manifest itself must be what this module writes, byte for byte: a changed space in it counts as damage too.
    """
    try:
        with read_errors(folder / MANIFEST):
            written = (folder / MANIFEST).read_bytes()
        listed = json.loads(written)["files"]
        expected = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in listed.items()}
        if written != _written(listed):
            raise ValueError("not as it was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("the manifest is missing or cannot be read", where=str(folder / MANIFEST)) from error
    present = {name: path for name, path in files_below(folder) if name != MANIFEST}
    for name in sorted(expected.keys() ^ present.keys()):
        if name not in expected and any(part[0] == "." or part in _UNLISTED for part in name.split("/")):
            continue
        reason = "is missing" if name in expected else "is not in the manifest"
        raise CheckpointError(f"a file {reason}", where=str(folder / name))
    for name, (size, digest) in expected.items():
        path = present[name]
        with read_errors(path):
            if path.is_symlink() or path.stat().st_size != size or sha256(path) != digest:
                raise CheckpointError("the file differs from its manifest", where=str(path))


def _written(entries: Mapping[str, object]) -> bytes:
    return (json.dumps({"version": 1, "files": entries}, indent=1) + "\n").encode()

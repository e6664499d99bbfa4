"""Single bits of a checkpoint turned over, one at a time: each must be found, and the checkpoint before taken."""

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path

from lorakit.errors import CheckpointError
from lorakit.storage.runs import RunFolder
from lorakit.training import checkpoint


def places(folder: Path, seed: int, count: int) -> Iterator[tuple[Path, int, int]]:
    """(file, byte, bit): a bit of every byte of headers and JSON, all bits of the manifest, ``count`` random ones."""
    draw = random.Random(seed)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        if path.suffix == ".json":
            length = path.stat().st_size
        else:
            length = 8 + int.from_bytes(path.read_bytes()[:8], "little")
            assert json.loads(path.read_bytes()[8:length]), "not a header"
        bits = range(8) if path.name == "manifest.json" else [None]
        yield from ((path, byte, draw.randrange(8) if bit is None else bit) for byte in range(length) for bit in bits)
    sizes = [path.stat().st_size for path in files]
    for path in draw.choices(files, sizes, k=count):
        yield path, draw.randrange(path.stat().st_size), draw.randrange(8)


def flip(path: Path, byte: int, bit: int) -> None:
    """Turn one bit over; a second call puts it back."""
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def try_all(run: Path, seed: int, count: int, stride: int = 1) -> tuple[int, list[str]]:
    """Flips tried, and those not found, in the newest of two or more checkpoints. ``stride``: each so many-th only."""
    folder = RunFolder(run)
    (*_, (before, _), (_, newest)) = folder.saved()
    tried, missed = 0, []
    logging.getLogger("lorakit").addHandler(logging.NullHandler())
    for path, byte, bit in list(places(newest, seed, count))[::stride]:
        flip(path, byte, bit)
        try:
            found = checkpoint.newest(folder)
            if found is None or found.state.step != before:
                missed.append(f"{path.name} byte {byte} bit {bit} was not found")
        except CheckpointError as error:
            missed.append(f"{path.name} byte {byte} bit {bit}: {error}")
        tried += 1
        flip(path, byte, bit)
    return tried, missed

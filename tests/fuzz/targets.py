"""What is fuzzed: broken inputs made from sound ones, and the one promise that holds for all of them.

Each target runs a command in a fork with a limit of memory and time: no traceback, no exit code outside the list,
nothing that nobody foresaw.
"""

import json
import os
import shutil
import struct
from pathlib import Path

from hypothesis import strategies as st

from tests.faults.harness import Told, forked
from tests.raw_gguf import RawGguf

MEGABYTES, SECONDS = 1000, 60
CODES = frozenset({0, 2, 3, 4, 5, 7})

ODD: st.SearchStrategy[object] = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.sampled_from([0, -1, 1, 2**31, 10**9, "", "..", "/", "\0", [], {}, [[]], [None], "__import__"]),
)  # fmt: skip
TREE = st.recursive(ODD, lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(max_size=6), t, max_size=3))
Cut = tuple[float, int, bytes]
CUTS: st.SearchStrategy[list[Cut]] = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=12)), min_size=1, max_size=4
)
"""Places in a file (as a share of it), bytes to take away there, bytes to put in."""


def spoil(path: Path, cuts: list[Cut], head: int | None = None) -> None:
    """Change a file's bytes; with ``head`` only its first so many."""
    data = path.read_bytes()
    for share, gone, put in cuts:
        place = int(share * (len(data) if head is None else min(head, len(data))))
        data = data[:place] + put + data[place + gone :]
    path.write_bytes(data)


def set_key(path: Path, key: str | int, value: object) -> None:
    """Change one value of a JSON object, chosen by name or by number."""
    table = json.loads(path.read_text())
    keys = list(table) or [""]
    table[keys[key % len(keys)] if isinstance(key, int) else key] = value
    path.write_text(json.dumps(table))


def set_header(path: Path, number: int, field: str, value: object) -> None:
    """Change one field of one tensor's entry in a safetensors header."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    name = names[number % len(names)]
    if field == "name":
        header[str(value)] = header.pop(name)
    else:
        header[name][field] = value
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def set_gguf(path: Path, number: int, field: str, value: int, content: bytes) -> None:
    """Change one key's value or one tensor's entry in a GGUF file: its type, its number, its size, its name."""
    raw = RawGguf.read(path)
    if field in ("key", "value"):
        place = number % len(raw.keys)
        name, old = raw.keys[place]
        raw.keys[place] = (content, old) if field == "key" else (name, old[: value % 20] + content + old[20:])
    elif field == "name":
        place = number % len(raw.tensors)
        raw.tensors[place] = (content, raw.tensors[place][1])
    elif field == "sizes":
        raw.tensors[number % len(raw.tensors)][1].sizes[0] = abs(value) % 2**64
    else:
        setattr(raw.tensors[number % len(raw.tensors)][1], field, abs(value) % (64 if field == "kind" else 2**64))
    raw.write(path)


def promise(told: Told) -> None:
    """What holds whatever the input is: done, or refused for what is in it, never for the memory that it took."""
    assert told.code in CODES, told
    assert "Traceback" not in told.err + told.out, told.err
    assert "nobody foresaw" not in told.err, told.err
    if told.code:
        assert told.error.isprintable()


def run(*words: object) -> Told:
    told = forked(*words, megabytes=MEGABYTES, seconds=SECONDS)
    promise(told)
    return told


def fresh(whole: Path, place: Path) -> Path:
    """A copy of a sound folder at ``place``."""
    shutil.rmtree(place, ignore_errors=True)
    return Path(shutil.copytree(whole, place))


def removed(path: Path) -> None:
    path.unlink()


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def halved(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)

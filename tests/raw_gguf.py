"""A sound GGUF file taken apart by the gguf package, for a test to change one entry and put it together again."""

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import gguf

TEXT, ARRAY, U32, U64, F32 = 8, 9, 4, 10, 6


def text(value: str | bytes) -> bytes:
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def typed(kind: int, value: bytes) -> bytes:
    return struct.pack("<I", kind) + value


def string(value: str | bytes) -> bytes:
    """A key's value: its type and its bytes."""
    return typed(TEXT, text(value))


def number(value: int, kind: int = U64) -> bytes:
    return typed(kind, struct.pack("<I" if kind == U32 else "<Q", value))


def real(value: float) -> bytes:
    return typed(F32, struct.pack("<f", value))


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return typed(ARRAY, struct.pack("<IQ", kind, count) + items)


@dataclass
class Entry:
    """A tensor: its sizes, innermost first, the number of its type, its offset in the data."""

    sizes: list[int]
    kind: int
    offset: int

    def packed(self) -> bytes:
        sizes = struct.pack(f"<I{len(self.sizes)}Q", len(self.sizes), *self.sizes)
        return sizes + struct.pack("<IQ", self.kind, self.offset)


@dataclass
class RawGguf:
    """Pairs of a name and its bytes, so that a name may be there twice; counts as they are unless given."""

    keys: list[tuple[bytes, bytes]] = field(default_factory=list)
    tensors: list[tuple[bytes, Entry]] = field(default_factory=list)
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: int = 3
    key_count: int | None = None
    tensor_count: int | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        reader = gguf.GGUFReader(path)
        fields = [f for name, f in reader.fields.items() if not name.startswith("GGUF.")]
        keys = [(bytes(f.parts[1]), b"".join(part.tobytes() for part in f.parts[2:])) for f in fields]
        parts = [tensor.field.parts for tensor in reader.tensors]
        tensors = [(bytes(p[1]), Entry([int(n) for n in p[3]], int(p[4][0]), int(p[5][0]))) for p in parts]
        return cls(keys, tensors, path.read_bytes()[reader.data_offset :])

    def set(self, key: str, value: bytes) -> Self:
        self.keys = [(name, old) for name, old in self.keys if name != key.encode()] + [(key.encode(), value)]
        return self

    def tensor(self, name: str) -> Entry:
        return dict(self.tensors)[name.encode()]

    def without(self, name: str) -> Self:
        """Take a tensor and its bytes out; those behind it move up. float32 and multiples of 32 bytes only."""
        gone = self.tensor(name)
        size = 4
        for n in gone.sizes:
            size *= n
        self.data = self.data[: gone.offset] + self.data[gone.offset + size :]
        self.tensors = [(other, entry) for other, entry in self.tensors if entry is not gone]
        for _, entry in self.tensors:
            entry.offset -= size if entry.offset > gone.offset else 0
        return self

    def write(self, path: Path) -> Path:
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        keys = len(self.keys) if self.key_count is None else self.key_count
        head = self.magic + struct.pack("<IQQ", self.version, tensors, keys)
        head += b"".join(text(name) + value for name, value in self.keys)
        head += b"".join(text(name) + entry.packed() for name, entry in self.tensors)
        path.write_bytes(head + bytes(-len(head) % 32) + self.data)
        return path

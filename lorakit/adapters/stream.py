"""safetensors files read and written a few rows at a time, so that a model never has to fit into memory.

A file to be written is a list of tensors, each stacked from rows of tensors that are elsewhere, changed or as they are.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lorakit.adapters.change import Change
from lorakit.errors import ModelError
from lorakit.storage.headers import read_header

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
SPELLING = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
"""The dtypes that a weight may have for an adapter to be added, and that ``--dtype`` converts."""
READ = 16 << 20
"""Bytes of a tensor that are in memory at a time, for each file in work."""
WORK = 256 << 10
"""Elements that are summed at a time: few enough to stay in a core's cache."""


class Slot(NamedTuple):
    """A tensor's dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Its first dimension; a scalar is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape[1:])


class Source(Protocol):
    """Tensors to be had row by row."""

    slots: dict[str, Slot]
    metadata: dict[str, str]

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """[last - first, columns], in memory of its own or not to be written to."""
        ...


class FileSource:
    """The tensors of one checked safetensors file."""

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self.path, self.metadata, self._start = path, header.metadata, header.start
        self.slots = {name: Slot(DTYPES[info.dtype], info.shape) for name, info in header.tensors.items()}
        self._begin = {name: info.begin for name, info in header.tensors.items()}

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows of a tensor as the file has them now; ModelError when it has become shorter."""
        slot = self.slots[name]
        width = slot.columns * slot.dtype.itemsize
        content = torch.empty((last - first) * width, dtype=torch.uint8)
        if len(content):
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._start + self._begin[name] + first * width)
                if file.readinto(content.numpy().data) != len(content):
                    raise ModelError("the file changed while it was read", where=f"{self.path}: {name}")
        return content.view(slot.dtype).view(last - first, slot.columns)


class MemorySource:
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.metadata = {"format": "pt"}
        self.slots = {name: Slot(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def rows(self, name: str, first: int, last: int) -> Tensor:
        slot = self.slots[name]
        return self._tensors[name].reshape(slot.rows, slot.columns)[first:last]


class Piece(NamedTuple):
    """Rows ``first`` to ``last`` of a source's tensor, and what changes them."""

    source: Source
    name: str
    first: int
    last: int
    change: Change | None = None

    def blocks(self, elements: int) -> Iterator[tuple[int, int]]:
        """The rows cut into spans of at most ``elements``, a whole row at least."""
        step = max(1, elements // max(1, self.source.slots[self.name].columns))
        for first in range(self.first, self.last, step):
            yield first, min(first + step, self.last)


class Target(NamedTuple):
    """A tensor to be written: its pieces below one another."""

    slot: Slot
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class OutFile:
    """A safetensors file to be written, its tensors in order."""

    tensors: dict[str, Target]
    metadata: dict[str, str]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(target.slot.bytes for target in self.tensors.values())

    def header(self) -> bytes:
        entries: dict[str, object] = {"__metadata__": self.metadata} if self.metadata else {}
        place = 0
        for name, (slot, _) in self.tensors.items():
            ends = [place, place + slot.bytes]
            entries[name] = {"dtype": SPELLING[slot.dtype], "shape": list(slot.shape), "data_offsets": ends}
            place += slot.bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


class Tally:
    """What happened to the changed weights, in sums that can be added up."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()
        self.rounding, self.error, self.change = 0.0, 0.0, 0.0

    def weights(self, before: Tensor, total: Tensor, after: Tensor) -> float:
        """Count some rows; their largest rounding, not finite when ``after`` is not. ``total`` is given up."""
        change = (total - before).flatten()
        self.change += torch.dot(change, change).item()
        error = total.sub_(after).flatten()
        self.error += torch.dot(error, error).item()
        self.dtypes.add(after.dtype)
        largest = float(torch.linalg.vector_norm(error, torch.inf))
        self.rounding = max(self.rounding, largest)
        return largest

    def add(self, other: "Tally") -> None:
        self.dtypes |= other.dtypes
        self.rounding = max(self.rounding, other.rounding)
        self.error += other.error
        self.change += other.change

    @property
    def lost(self) -> float:
        """Share of the change that rounding took: norm(written - sum) / norm(sum - W)."""
        return (self.error / self.change) ** 0.5 if self.change else 0.0


def write_file(path: Path, out: OutFile, tally: Tally, written: Callable[[int], None]) -> str:
    """Write a safetensors file and give its SHA-256; ``written`` is told the bytes of each block.

    Raises ModelError when a sum is not finite in its dtype.
    """
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file, torch.no_grad():

        def write(content: bytes | memoryview) -> None:
            digest.update(content)
            while content := content[file.write(content) :]:
                pass

        write(out.header())
        for slot, pieces in out.tensors.values():
            for piece in pieces:
                size = piece.source.slots[piece.name].dtype.itemsize
                for first, last in piece.blocks(READ // size):
                    after = _after(piece, first, last, slot.dtype, tally)
                    write(after.contiguous().flatten().view(torch.uint8).numpy().data)
                    written(after.nbytes)
    return digest.hexdigest()


def _after(piece: Piece, first: int, last: int, dtype: torch.dtype, tally: Tally) -> Tensor:
    """Rows as they are written: [last - first, columns] in ``dtype``."""
    before = piece.source.rows(piece.name, first, last)
    if piece.change is None:
        after = before.to(dtype)
        finite = dtype == before.dtype or bool(torch.isfinite(after).all())
    else:
        after, finite = torch.empty(before.shape, dtype=dtype), True
        for a, b in Piece(piece.source, piece.name, first, last).blocks(WORK):
            rows = slice(a - first, b - first)
            weight = before[rows].float()
            total = piece.change.rows(weight, a - piece.first)
            after[rows] = total
            finite &= math.isfinite(tally.weights(weight, total, after[rows]))
    if not finite:
        raise ModelError(f"not finite in {dtype}: it overflows, or was not finite before", where=piece.name)
    return after

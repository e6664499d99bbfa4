"""Tensors to be had row by row, from a safetensors file, so that no model has to fit into memory."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lorakit.adapters.merging.ahead import Ahead
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

BLOCK = 1 << 22
"""Numbers that are looked through at a time."""


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


class Told:
    """Another source, which tells ``go_on`` how many bytes are read."""

    def __init__(self, source: Source, go_on: Callable[[int], None]) -> None:
        self.slots, self.metadata = source.slots, source.metadata
        self._source, self._go_on = source, go_on

    def rows(self, name: str, first: int, last: int) -> Tensor:
        self._go_on((last - first) * self.slots[name].columns * self.slots[name].dtype.itemsize)
        return self._source.rows(name, first, last)


def is_finite(numbers: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    if not numbers.numel() or numbers.dtype not in FLOATS:
        return True
    return all(math.isfinite(float(end)) for end in torch.aminmax(numbers))  # many times as fast as torch.isfinite


def check_finite(source: Source, name: str, where: str) -> None:
    """Read a tensor, a few rows at a time; ModelError with ``where`` for NaN or infinity."""
    slot = source.slots[name]
    step = max(1, BLOCK // max(1, slot.columns))
    for first in range(0, slot.rows, step):
        if not is_finite(source.rows(name, first, min(first + step, slot.rows))):
            raise ModelError("NaN or infinity", where=where)


class FileSource:
    """The tensors of one checked safetensors file. Whoever reads them in order gets the file's digest remembered."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        """``fresh``: as the disk has them, even where the page cache has them too."""
        header = read_header(path)
        self.path, self.metadata, self._start = path, header.metadata, header.start
        self.slots = {name: Slot(DTYPES[info.dtype], info.shape) for name, info in header.tensors.items()}
        self._begin = {name: info.begin for name, info in header.tensors.items()}
        self._file = Ahead(path, header.start, fresh=fresh)
        self._reached, self._jumps = header.start, False

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows of a tensor as the file has them now; ModelError when it has become shorter."""
        slot = self.slots[name]
        width = slot.columns * slot.dtype.itemsize
        begin, end = (self._start + self._begin[name] + row * width for row in (first, last))
        if begin == end:
            return torch.empty(last - first, slot.columns, dtype=slot.dtype)
        if not first:  # a model reads its tensors in another order than a file has them
            self._jumps = begin != self._reached
        self._reached = end
        content = self._file.read(begin, end, begin + (slot.rows - first) * width if self._jumps else None)
        if len(content) != end - begin:
            raise ModelError("the file changed while it was read", where=f"{self.path}: {name}")
        if content.ctypes.data % slot.dtype.itemsize:
            content = content.copy()
        return torch.from_numpy(content).view(slot.dtype).view(last - first, slot.columns)

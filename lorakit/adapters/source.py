"""Tensors to be had row by row, from a safetensors file, so that no model has to fit into memory."""

import hashlib
import math
import os
import weakref
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lorakit.adapters.behind import Behind
from lorakit.errors import ModelError
from lorakit.storage.bases import remember_digest
from lorakit.storage.early import drop, open_in_order
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

    def __init__(self, path: Path, *, once: bool = False) -> None:
        """``once``: it will not be read again, so that its bytes need not stay in the page cache."""
        header = read_header(path)
        self.path, self.metadata, self._start = path, header.metadata, header.start
        self.slots = {name: Slot(DTYPES[info.dtype], info.shape) for name, info in header.tensors.items()}
        self._begin = {name: info.begin for name, info in header.tensors.items()}
        self._once, self._handle = once, open_in_order(path)
        weakref.finalize(self, os.close, self._handle)
        self._sha = hashlib.sha256()
        self._hash = Behind(self._sha.update)
        self._place, self._size = 0, path.stat().st_size
        """How far the file has been read in order, which a merge that keeps its layout does, and so hashes it."""

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows of a tensor as the file has them now; ModelError when it has become shorter."""
        slot = self.slots[name]
        width = slot.columns * slot.dtype.itemsize
        content = torch.empty((last - first) * width, dtype=torch.uint8)
        if len(content):
            place = self._start + self._begin[name] + first * width
            if place == self._start and not self._place:
                self._sha.update(os.pread(self._handle, self._start, 0))
                self._place = self._start
            if self._once:
                drop(self._handle, place)
            if os.preadv(self._handle, [content.numpy().data], place) != len(content):
                raise ModelError("the file changed while it was read", where=f"{self.path}: {name}")
            if place == self._place:
                self._place += len(content)
                self._hash.put(content.numpy().data)
                if self._place == self._size:
                    self._hash.wait()
                    remember_digest(self.path, self._sha.digest())
        return content.view(slot.dtype).view(last - first, slot.columns)

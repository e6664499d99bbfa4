"""GGUF headers, read and checked without touching a tensor: what is in a file, and is all of it there.

The format: ``GGUF``, version, count of tensors, count of keys; then each key with its typed value; then each tensor's
name, sizes (the innermost first), type and offset; then, from the next multiple of the alignment on, the data. A
library that reads it makes an object of every item that a count claims, so each count is held against the file first:
a hostile header costs at most 200 MB and half a second.
"""

import math
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from lorakit.errors import ModelError

LARGEST = 64_000_000
"""Bytes that a header may have: a vocabulary of 256,000 pieces takes 10 million."""
MOST_KEYS, MOST_TENSORS = 10_000, 20_000
MOST_ITEMS, MOST_TEXTS = 2_000_000, 1_000_000
"""Items of all arrays together, and strings among them: Gemma 3 has 777,050 pieces and merges."""
LONGEST_NAME, LONGEST_TEXT, LONGEST_ITEM = 256, 1_000_000, 2_048
"""Bytes of a key or a tensor's name, of a string, and of a string in an array (a piece of a vocabulary)."""

_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
NUMBERS = {kind: struct.Struct(f"<{code}") for kind, code in _CODES.items()}
"""A value's type number and how it is packed."""
TEXT, ARRAY = 8, 9
U32, U64 = NUMBERS[4], NUMBERS[10]
ENTRIES = {rank: struct.Struct(f"<{rank}QIQ") for rank in range(1, 5)}
"""A tensor's sizes, type and offset, by its count of dimensions."""


@dataclass(frozen=True)
class Items:
    """An array: the number of its items' type (``NUMBERS``, or ``TEXT``) and how many there are."""

    kind: int
    count: int


Value = int | float | bool | str | Items


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its type's name (F32, Q4_1), its shape as torch has it, its bytes counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """A file's keys and tensors, in the file's order."""

    values: dict[str, Value]
    tensors: dict[str, GgufTensor]


class _Cursor:
    """A place in a file's bytes that moves on as values are read, and never past the header's limit."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self._data, self._end, self.place = data, min(size, LARGEST), 0

    def skip(self, size: int) -> int:
        """Pass over so many bytes; where they began."""
        if size > self._end - self.place:
            raise ValueError(f"{size} bytes are claimed at {self.place}, there are {self._end - self.place}")
        self.place += size
        return self.place - size

    def numbers(self, form: struct.Struct) -> tuple[Any, ...]:
        return form.unpack_from(self._data, self.skip(form.size))

    def count(self, form: struct.Struct = U64) -> int:
        return int(self.numbers(form)[0])

    def text(self, most: int) -> str:
        length = self.count()
        if length > most:
            raise ValueError(f"a string of {length} bytes, more than {most}")
        begin = self.skip(length)
        return self._data[begin : begin + length].decode()

    def skip_texts(self, count: int) -> None:
        """Pass over the strings of an array, in one loop with nothing in it: a vocabulary has some 100,000."""
        unpack, data, place, last = U64.unpack_from, self._data, self.place, self._end - 8
        for number in range(count):
            if place > last:
                raise ValueError(f"{count} strings are claimed, there are {number}")
            length = unpack(data, place)[0]
            if length > LONGEST_ITEM:
                raise ValueError(f"a string of {length} bytes, more than {LONGEST_ITEM}")
            place += 8 + length
        self.skip(place - self.place)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """What is wrong in the block is wrong with ``name``."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _value(cursor: _Cursor, items_left: int, texts_left: int) -> Value:
    kind = cursor.count(U32)
    if kind == TEXT:
        return cursor.text(LONGEST_TEXT)
    if kind != ARRAY:
        if kind not in NUMBERS:
            raise ValueError(f"no type has the number {kind}")
        value: int | float | bool = cursor.numbers(NUMBERS[kind])[0]
        if not math.isfinite(value):
            raise ValueError(f"{value} is not a finite number")
        return value
    kind, count = cursor.count(U32), cursor.count()
    if kind == TEXT and count > texts_left:
        raise ValueError(f"an array of {count} strings, more than the {texts_left} that a header may still have")
    if count > items_left:
        raise ValueError(f"an array of {count} items, more than the {items_left} that a header may still have")
    if kind == TEXT:
        cursor.skip_texts(count)
    elif kind in NUMBERS:
        cursor.skip(count * NUMBERS[kind].size)
    else:
        raise ValueError("an array of arrays" if kind == ARRAY else f"no type has the number {kind}")
    return Items(kind, count)


def _values(cursor: _Cursor, count: int) -> dict[str, Value]:
    values: dict[str, Value] = {}
    items, texts = MOST_ITEMS, MOST_TEXTS
    for number in range(count):
        with _named(f"key {number + 1}"):
            key = cursor.text(LONGEST_NAME)
        if key in values:
            raise ValueError(f"{key}: there twice")
        with _named(key):
            value = values[key] = _value(cursor, items, texts)
        if isinstance(value, Items):
            items -= value.count
            texts -= value.count if value.kind == TEXT else 0
    return values


def _tensor(cursor: _Cursor, alignment: int, begin: int) -> GgufTensor:
    """The next tensor's entry; its bytes must start ``begin`` after the start of the data."""
    rank = cursor.count(U32)
    if rank not in ENTRIES:
        raise ValueError(f"{rank} dimensions, not 1 to 4")
    *sizes, kind, offset = cursor.numbers(ENTRIES[rank])
    try:
        dtype = gguf.GGMLQuantizationType(kind)
        block, width = gguf.GGML_QUANT_SIZES[dtype]
    except (ValueError, KeyError):
        raise ValueError(f"no tensor type has the number {kind}") from None
    if any(not 0 < size < 2**31 for size in sizes) or math.prod(sizes) >= 2**48 or sizes[0] % block:
        raise ValueError(f"{dtype.name} {sizes[::-1]} is no shape")
    if offset != begin:
        raise ValueError(f"overlaps another tensor, leaves a hole or is not aligned to {alignment} bytes")
    return GgufTensor(dtype.name, tuple(reversed(sizes)), offset, offset + math.prod(sizes) // block * width)


def _aligned(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment


def _parse(cursor: _Cursor, size: int) -> GgufHeader:
    magic, version = cursor.count(U32), cursor.count(U32)
    if magic != gguf.GGUF_MAGIC or version not in (2, 3):
        raise ValueError("not a little-endian GGUF file of version 2 or 3")
    tensors, keys = cursor.count(), cursor.count()
    for count, most, what in ((tensors, MOST_TENSORS, "tensors"), (keys, MOST_KEYS, "keys")):
        if count > most:
            raise ValueError(f"{count} {what}, more than {most}")
    values = _values(cursor, keys)
    alignment = values.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= 65_536 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment: {alignment!r} is no alignment")
    found: dict[str, GgufTensor] = {}
    place = 0
    for number in range(tensors):
        with _named(f"tensor {number + 1}"):
            name = cursor.text(LONGEST_NAME)
        if name in found:
            raise ValueError(f"{name}: there twice")
        with _named(name):
            found[name] = _tensor(cursor, alignment, place)
        end = found[name].end
        place = _aligned(end, alignment)
    start = _aligned(cursor.place, alignment)
    if found and not start + end <= size <= start + place:
        raise ValueError(f"truncated or overlong: its tensors end at {start + end}, the file has {size} bytes")
    moved = {name: GgufTensor(t.dtype, t.shape, start + t.begin, start + t.end) for name, t in found.items()}
    return GgufHeader(values, moved)


def read_gguf(path: Path) -> GgufHeader:
    """The checked header of a GGUF file.

    Raises ModelError when the file is absent, truncated or overlong, a count, an array or a string is longer than the
    file or the limits above, arrays are nested, a name is there twice, or tensors overlap, leave holes, or do not take
    the bytes that their type and shape say.
    """
    if not path.is_file():
        raise ModelError("no such file", where=str(path))
    try:
        size = path.stat().st_size
        private = {"flags": mmap.MAP_PRIVATE, "prot": mmap.PROT_READ}  # which FUSE has where it has no shared one
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, **private) as data:
            return _parse(_Cursor(data, size), size)
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, OverflowError) as error:
        raise ModelError(f"broken GGUF header: {error}", where=str(path), hint="get the file again") from error

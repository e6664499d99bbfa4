"""safetensors headers, read and checked without touching a tensor: what is in a file, and is all of it there.

The format: 8 bytes little-endian header length N, N bytes of JSON ``{name: {dtype, shape, data_offsets}}``, then data.
A hostile header costs at most 200 MB and no allocation of what it claims.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import ModelError
from lorakit.storage.disk import read_errors

LARGEST = 10_000_000
"""Bytes of JSON that a header may have, about 100,000 tensors; the format itself stops at ten times as much."""

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its dtype in safetensors' spelling, its shape, and its bytes counted from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A file's tensors in the order of their bytes, its metadata, and where in the file the data starts."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    start: int


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(n for n in names if names.count(n) > 1)!r}")
    return found


def _tensor(name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: not a tensor's entry")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name}: unknown dtype {str(dtype)[:20]!r}")
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not lists or any(type(n) is not int or not 0 <= n < 2**63 for n in (*shape, *offsets)):
        raise ValueError(f"{name}: shape or offsets are not numbers")
    if (offsets[1] - offsets[0]) * 8 != math.prod(shape) * BITS[dtype]:
        raise ValueError(f"{name}: {dtype} {shape} does not take {offsets[1] - offsets[0]} bytes")
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _parse(text: bytes) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    entries = json.loads(text, object_pairs_hook=_unique)
    if not isinstance(entries, dict):
        raise ValueError("the header is not an object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not a table of strings")
    tensors = {name: _tensor(name, entry) for name, entry in entries.items()}
    return dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end))), metadata


def header_bytes(path: Path) -> bytes:
    """A file's header as it stands there, unchecked.

    Raises ModelError when the file has not that much, ResourceError when it cannot be read.
    """
    with read_errors(path):
        if not path.is_file():
            raise ModelError("no such file", where=str(path))
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > LARGEST or 8 + length > size:
                raise ModelError(
                    f"not a whole safetensors file: its header claims {length} bytes, the file has {size}",
                    where=str(path),
                    hint="get the file again",
                )
            return file.read(length)


def read_header(path: Path) -> Header:
    """The checked header of a safetensors file.

    Raises ModelError when the file is absent or truncated, the header is malformed or oversized, or tensors overlap,
    leave holes, or do not take the bytes that their dtype and shape say.
    """
    text = header_bytes(path)
    size, start = path.stat().st_size, 8 + len(text)
    try:
        tensors, metadata = _parse(text)
        place = 0
        for name, info in tensors.items():
            if info.begin != place:
                raise ValueError(f"{name}: overlaps another tensor or leaves a hole")
            place = info.end
    except (ValueError, RecursionError) as error:
        raise ModelError(f"broken safetensors header: {error}", where=str(path)) from error
    if start + place != size:
        raise ModelError(
            f"truncated or overlong: its tensors take {start + place} bytes, the file has {size}",
            where=str(path),
            hint="get the file again",
        )
    return Header(tensors, metadata, start)

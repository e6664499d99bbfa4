"""safetensors files read and written one tensor at a time, so that a model never has to fit into memory."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lorakit.errors import ModelError
from lorakit.storage.headers import TensorInfo, read_header

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
    """A tensor's place in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Source(Protocol):
    """Tensors to be had one by one."""

    slots: dict[str, Slot]
    metadata: dict[str, str]

    def read(self, name: str) -> Tensor: ...


class FileSource:
    """The tensors of one checked safetensors file."""

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self._path, self._start, self._tensors = path, header.start, header.tensors
        self.metadata = header.metadata
        self.slots = {name: Slot(DTYPES[info.dtype], info.shape) for name, info in header.tensors.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own; ModelError when the file has become shorter."""
        info: TensorInfo = self._tensors[name]
        with self._path.open("rb") as file:
            file.seek(self._start + info.begin)
            content = bytearray(file.read(info.end - info.begin))
        if len(content) != info.end - info.begin:
            raise ModelError("the file changed while it was read", where=f"{self._path}: {name}")
        slot = self.slots[name]
        if not content:
            return torch.empty(slot.shape, dtype=slot.dtype)
        return torch.frombuffer(content, dtype=slot.dtype).reshape(slot.shape)


class MemorySource:
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors, self.metadata = tensors, {"format": "pt"}
        self.slots = {name: Slot(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def write_stream(
    path: Path, slots: Mapping[str, Slot], metadata: Mapping[str, str], tensor: Callable[[str], Tensor]
) -> None:
    """Write a safetensors file; ``tensor`` gives each one when its turn comes, in the dtype and shape of its slot."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name, slot in slots.items():
        entries[name] = {
            "dtype": SPELLING[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [place, place + slot.bytes],
        }
        place += slot.bytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, slot in slots.items():
            value = tensor(name).detach().cpu().contiguous()
            if value.dtype != slot.dtype or tuple(value.shape) != slot.shape:
                raise ModelError(f"{value.dtype} {tuple(value.shape)} where {slot} was announced", where=name)
            if slot.bytes:
                file.write(value.reshape(-1).view(torch.uint8).numpy().data)

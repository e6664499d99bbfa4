"""The weights of a folder that bitsandbytes stored in 4 bits, dequantized by its own kernels a few rows at a time.

Beside the codes ``X``, two to a byte, are ``X.absmax``, the maximum of each block of weights, and as JSON in bytes
``X.quant_state.bitsandbytes__nf4`` or ``__fp4``: shape, dtype and block size. Maxima that are quantized too are uint8,
with ``X.nested_absmax``, ``X.nested_quant_map`` and an offset (Dettmers et al. 2023, arXiv:2305.14314). The state of a
weight may be in another shard than its codes.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.adapters.merging.source import FLOATS, Slot, Source
from lorakit.errors import ModelError
from lorakit.numerics.compiled import compiled_when_called
from lorakit.storage.configs import FOUR_BIT

with compiled_when_called():
    from bitsandbytes import functional

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""What bitsandbytes dequantizes to."""
BLOCKS = {32, 64, 128, 256, 512, 1024, 2048, 4096}
BESIDE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
LONGEST = 10_000
"""Bytes of JSON that a state may have."""


class State(NamedTuple):
    """What is stored beside a weight's codes, but for its maxima."""

    kind: str
    """``nf4`` or ``fp4``."""
    slot: Slot
    """Of the weight."""
    block: int
    """Weights that share a maximum."""
    nested: tuple[int, float] | None
    """Of quantized maxima: how many share a maximum, and what is added to them."""


def dequantized(sources: Mapping[str, Source]) -> dict[str, Source]:
    """The files of a folder with plain weights in the place of those that are stored in 4 bits.

    Raises ModelError for a state that does not fit its weight, and for a weight of whole numbers without one.
    """
    homes = {name: source for source in sources.values() for name in source.slots}
    states, beside = {}, set()
    for key in homes:
        name, mark, kind = key.partition(FOUR_BIT)
        if mark:
            states[name] = _state(homes, name, key, kind)
            beside |= {key, *(f"{name}.{end}" for end in BESIDE)}
    found: dict[str, Source] = {file: FourBitSource(source, homes, states, beside) for file, source in sources.items()}
    for source in found.values():
        for name, slot in source.slots.items():
            if slot.dtype not in FLOATS:
                raise ModelError(f"{slot.dtype}, without the state of 4-bit weights", where=name)
    return found


class FourBitSource:
    """One file's source, dequantized: in the dtype that a weight's state tells, as bitsandbytes rounds it."""

    def __init__(
        self, source: Source, homes: Mapping[str, Source], states: Mapping[str, State], beside: set[str]
    ) -> None:
        """``homes``: where each tensor of the folder is; ``beside``: the names of those that are no model's."""
        self.slots = {
            name: states[name].slot if name in states else slot
            for name, slot in source.slots.items()
            if name not in beside
        }
        self.metadata = source.metadata
        self._source, self._homes, self._states = source, homes, states
        self._last = ("", torch.empty(0))

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """[last - first, columns]"""
        if name not in self._states:
            return self._source.rows(name, first, last)
        kind, slot, block, _ = self._states[name]
        begin, end = first * slot.columns, last * slot.columns
        start, stop = begin // block * block, min(-(-end // block) * block, slot.rows * slot.columns)
        pair = 2 * self._source.slots[name].dtype.itemsize  # weights in one element of the codes
        codes = self._source.rows(name, start // pair, -(-stop // pair)).flatten().view(torch.uint8)
        maxima = self._maxima(name)[start // block : -(-stop // block)]
        # As one row: bitsandbytes 0.50.2 for the CPU goes astray where a row ends within a block.
        state = functional.QuantState(maxima, (1, stop - start), None, block, kind, slot.dtype)
        found: Tensor = functional.dequantize_4bit(codes, state)
        return found.view(-1)[begin - start : end - start].view(last - first, slot.columns)

    def _maxima(self, name: str) -> Tensor:
        """Every block's maximum in float32; kept for the tensor that was asked for last."""
        last, maxima = self._last
        if last != name:
            maxima = self._read_maxima(name)
            self._last = name, maxima
        return maxima

    def _read_maxima(self, name: str) -> Tensor:
        stored, nested = _whole(self._homes, f"{name}.absmax"), self._states[name].nested
        if nested is None:
            return stored
        block, offset = nested
        largest, code = (_whole(self._homes, f"{name}.nested_{end}") for end in ("absmax", "quant_map"))
        state = functional.QuantState(largest, code=code, blocksize=block, dtype=torch.float32)
        back: Tensor = functional.dequantize_blockwise(stored, state)
        return back + offset


def _whole(homes: Mapping[str, Source], name: str) -> Tensor:
    """All of a vector."""
    return homes[name].rows(name, 0, homes[name].slots[name].rows).flatten()


def _state(homes: Mapping[str, Source], name: str, key: str, kind: str) -> State:
    """Of the weight ``name``, from the JSON in ``key``, held against what is stored. Raises ModelError."""
    try:
        if kind not in ("nf4", "fp4") or homes[key].slots[key].bytes > LONGEST:
            raise ValueError(key)
        told = json.loads(_whole(homes, key).numpy().tobytes())
        rows, columns = map(int, told["shape"])
        if min(rows, columns) < 1:
            raise ValueError(told)
        nested = None
        if "nested_offset" in told:
            nested = int(told["nested_blocksize"]), float(told["nested_offset"])
        state = State(kind, Slot(DTYPES[told["dtype"]], (rows, columns)), int(told["blocksize"]), nested)
        if state.block not in BLOCKS or (nested and nested[0] not in BLOCKS):
            raise ValueError(told)
        for end, expected in _expected(state).items():
            slot = homes[name + end].slots[name + end]
            found: Any = slot.bytes if not end else (slot.dtype, slot.bytes)
            if found != expected:
                raise ValueError(f"{end} is {found}")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ModelError("its state of 4 bits is not one of bitsandbytes, or does not fit it", where=name) from error
    return state


def _expected(state: State) -> dict[str, Any]:
    """The bytes of the codes, and dtype and bytes of what is beside them."""
    weights = math.prod(state.slot.shape)
    blocks = -(-weights // state.block)
    if state.nested is None:
        return {"": -(-weights // 2), ".absmax": (torch.float32, 4 * blocks)}
    return {
        "": -(-weights // 2),
        ".absmax": (torch.uint8, blocks),
        ".nested_absmax": (torch.float32, 4 * -(-blocks // state.nested[0])),
        ".nested_quant_map": (torch.float32, 4 * 256),
    }

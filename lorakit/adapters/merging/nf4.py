"""A base's weights as training over 4-bit weights saw them: quantized to NF4 and back, a few rows at a time.

bitsandbytes' kernels, with its blocks of 64 and the blocks' maxima quantized too (Dettmers et al. 2023,
arXiv:2305.14314). In float32, whatever the base's dtype.
"""

import math
import threading
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.merging.base import OpenBase
from lorakit.adapters.merging.source import Source
from lorakit.errors import RecipeError
from lorakit.numerics.compiled import compiled_when_called
from lorakit.storage.direct import ROOMS

with compiled_when_called():
    from bitsandbytes import functional

BLOCK = 64
"""Weights that share a maximum."""
READ = 4 << 20
"""Weights that are read at a time for their maxima."""
PIECE = 1 << 18
"""Weights that are quantized at a time, a multiple of BLOCK: what that takes is small beside what is read."""


def as_trained(base: OpenBase) -> dict[str, Source]:
    """The base's sources with every weight that 4-bit training quantizes, which is all linear layers but the head; none
    of a base that is stored in 4 bits, whose weights are what training saw.

    RecipeError for a base that is not trained over 4-bit weights.
    """
    if base.four_bit:
        return {}
    model: Any = base.models.get("model")
    if model is None:
        raise RecipeError("only language models are trained over 4-bit weights", where="--quant-base as-trained")
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    homes = [base.homes["model"][f"{name}.weight"] for name in linear]
    return {
        file: NF4Source(source, {home.name for home in homes if home.file == file})
        for file, source in base.sources.items()
    }


class NF4Source:
    """Another source with the tensors in ``names`` quantized and back; ``slots`` keep telling the dtype on the disk."""

    def __init__(self, source: Source, names: set[str]) -> None:
        self.slots, self.metadata = source.slots, source.metadata
        self._source, self._names = source, names
        self._lock, self._last = threading.Lock(), ("", torch.empty(0))

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """[last - first, columns], float32 where it was quantized."""
        if name not in self._names:
            return self._source.rows(name, first, last)
        columns = self.slots[name].columns
        start, end = self._aligned(name, first, last)
        read = self._source.rows(name, start, end).view(-1)
        maxima = self._maxima(name)[start * columns // BLOCK : -(-end * columns // BLOCK)]
        found = torch.from_numpy(ROOMS.take(read.numel() * torch.float32.itemsize)).view(torch.float32)
        pieces = zip(
            torch.split(read, PIECE), torch.split(maxima, PIECE // BLOCK), torch.split(found, PIECE), strict=True
        )
        for weights, largest, back in pieces:
            codes, state = _quantize(weights)
            state.absmax = largest
            back.copy_(functional.dequantize_4bit(codes, state).view(-1))
        return found.view(end - start, columns)[first - start : last - start]

    def _aligned(self, name: str, first: int, last: int) -> tuple[int, int]:
        """Rows around these that begin and end with a block, or the tensor."""
        step = BLOCK // math.gcd(BLOCK, self.slots[name].columns)
        return first // step * step, min(self.slots[name].rows, -(-last // step) * step)

    def _maxima(self, name: str) -> Tensor:
        """Every block's maximum, quantized and back; kept for the tensor that was asked for last."""
        with self._lock:
            if self._last[0] != name:
                self._last = (name, self._read_maxima(name))
            return self._last[1]

    def _read_maxima(self, name: str) -> Tensor:
        slot, found, first = self.slots[name], [], 0
        while first < slot.rows:
            _, last = self._aligned(name, first, min(slot.rows, first + max(1, READ // slot.columns)))
            read = self._source.rows(name, first, last).view(-1)
            found += [_largest(weights) for weights in torch.split(read, PIECE)]
            first = last
        maxima = torch.cat(found)
        offset = maxima.mean()
        codes, state = functional.quantize_blockwise(maxima - offset, blocksize=256)
        back: Tensor = functional.dequantize_blockwise(codes, state)
        return back + offset


def _largest(weights: Tensor) -> Tensor:
    """The maximum of each block, which ``_quantize`` would find too; the last block may be a part of one."""
    blocks = nn.functional.pad(weights.float(), (0, -len(weights) % BLOCK)).view(-1, BLOCK)
    return blocks.abs().amax(1)  # ten times as fast as the maximum norm


def _quantize(weights: Tensor) -> tuple[Tensor, Any]:
    """As one row: bitsandbytes 0.50.2 for the CPU goes astray where a row ends within a block."""
    row = weights.float().reshape(1, -1)
    codes, state = functional.quantize_4bit(row, blocksize=BLOCK, quant_type="nf4")
    return codes, state

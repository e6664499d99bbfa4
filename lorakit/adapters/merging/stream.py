"""safetensors files written a few rows at a time.

A file to be written is a list of tensors, each stacked from rows of tensors that are elsewhere, changed or as they are.
"""

import hashlib
import json
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from lorakit.adapters.merging.behind import Behind
from lorakit.adapters.merging.change import WORK, Change, rows_at_once
from lorakit.adapters.merging.source import SPELLING, Slot, Source, is_finite
from lorakit.errors import ModelError
from lorakit.storage.direct import ALIGN, ROOMS, Bytes, DirectWriter

READ = 8 << 20
"""Bytes of a tensor that are read, and written, at a time."""

AT_ONCE = 3
"""Blocks of a file that are computed side by side."""

NEAR = 2.0**-15
"""A rounding of this share of the sum is so far above float32's own 2^-25 that this does not show in it."""


class Span(NamedTuple):
    """Rows ``first`` to ``last`` of a source's tensor, and what changes them."""

    source: Source
    name: str
    first: int
    last: int
    change: Change | None = None
    used: bool = True
    """A component computes with it, so that its numbers have to be finite."""

    def blocks(self, elements: int) -> Iterator[tuple[int, int]]:
        """The rows cut into multiples of ``rows_at_once``, of at most ``elements`` numbers where one of them fits."""
        columns = max(1, self.source.slots[self.name].columns)
        step = rows_at_once(columns)
        step *= max(1, elements // (step * columns))
        for first in range(self.first, self.last, step):
            yield first, min(first + step, self.last)


class Target(NamedTuple):
    """A tensor to be written: its spans below one another."""

    slot: Slot
    spans: tuple[Span, ...]


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
        """With its length before it. Of an untouched file it is what the library writes, else it fills whole blocks of
        the disk, so that the tensors begin with one."""
        entries: dict[str, object] = {"__metadata__": self.metadata} if self.metadata else {}
        place = 0
        for name, (slot, _) in self.tensors.items():
            ends = [place, place + slot.bytes]
            entries[name] = {"dtype": SPELLING[slot.dtype], "shape": list(slot.shape), "data_offsets": ends}
            place += slot.bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        changed = any(span.change for target in self.tensors.values() for span in target.spans)
        text += b" " * (-(len(text) + 8) % (ALIGN if changed else 8))
        return len(text).to_bytes(8, "little") + text


class Tally:
    """What happened to the changed weights, in sums that can be added up."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()
        self.rounding, self.error, self.change = 0.0, 0.0, 0.0

    def weights(self, total: Tensor, after: Tensor, exact: Callable[[Tensor], Tensor]) -> float:
        """Count some rows; the span of their rounding, not finite when ``after`` is not. ``total`` is given up.

        ``exact`` gives the rounding from what was written. It is asked where the float32 sum's own rounding counts
        beside the dtype's.
        """
        same = after.dtype == torch.float32
        written = after if same else worked(after, torch.float32, 1)  # quicker than a difference of two dtypes
        size = _square(total)
        error = total.sub_(written)
        square = _square(error)
        if square < NEAR**2 * size:
            error = exact(written)
            square = _square(error)
        self.error += square
        self.dtypes.add(after.dtype)
        least, most = (float(end) for end in torch.aminmax(error))  # twenty times as fast as the maximum norm
        self.rounding = max(self.rounding, -least, most)
        return most - least

    def add(self, other: "Tally") -> None:
        self.dtypes |= other.dtypes
        self.rounding = max(self.rounding, other.rounding)
        self.error += other.error
        self.change += other.change

    @property
    def lost(self) -> float:
        """Share of the change that rounding took: norm(written - sum) / norm(sum - W), of the exact sum; but the change
        that DoRA makes, or what takes a tensor's place, is measured from the float32 one."""
        return (self.error / self.change) ** 0.5 if self.change else 0.0


def _rounding(before: Tensor, change: Change, first: int, written: Tensor) -> Tensor:
    """W + LoRA - written as (W - written) + LoRA, of which the first is exact where the two are near each other; of
    DoRA, and of what takes a tensor's place, from the float64 sum."""
    error = worked(before, change.dtype)
    if change.square is None:
        change.add_(error, first)
        return error.sub_(written)
    change.add_(error.sub_(written), first)
    return error


def _square(numbers: Tensor) -> float:
    flat = numbers.flatten()
    return float(torch.dot(flat, flat))


def worked(rows: Tensor, dtype: torch.dtype, which: int = 0) -> Tensor:
    """Rows in another dtype, in memory that the thread's next call with the same ``which`` uses again: new pages cost
    more than the sums."""
    kept: dict[int, Tensor] = _scratch.__dict__.setdefault("kept", {})
    size = rows.numel() * dtype.itemsize
    if which not in kept or kept[which].nbytes < size:
        kept[which] = torch.empty(size, dtype=torch.uint8)
    return kept[which][:size].view(dtype).view(rows.shape).copy_(rows)


_scratch = threading.local()


class Summed(NamedTuple):
    """Rows of a changed tensor, ready to be written."""

    name: str
    change: Change
    first: int
    """The first row, counted as ``change`` does."""
    before: Tensor
    """[n, columns], the base's."""
    after: Tensor
    """[n, columns], in the dtype of the file."""


Prove = Callable[[Summed], None]
"""Raises ModelError for rows that should not be written."""

Block = tuple[str, int, int]
"""A tensor's name, its first row, and the one behind its last."""


class Written(NamedTuple):
    """What a file was written with."""

    sha256: str
    blocks: dict[Block, bytes]
    """The XXH3 of each block of rows, in order."""


def write_file(
    path: Path,
    out: OutFile,
    tally: Tally,
    written: Callable[[int], None],
    sums: Executor,
    prove: Prove | None = None,
) -> Written:
    """Write a safetensors file; ``written`` is told the bytes of each block.

    ``sums`` computes blocks, which are written in their order. ``prove`` is given all that was summed, and the digests
    are of just what it was given, as it was then.

    Raises ModelError when a sum is not finite in its dtype, or the base is not, and what ``prove`` raises.
    """
    digest = hashlib.sha256()
    blocks: dict[Block, bytes] = {}

    def settle(settled: tuple[Bytes, Block | None, Summed | None]) -> None:
        content, block, summed = settled
        if prove is not None and summed is not None:
            prove(summed)
        digest.update(content.data)
        if block is not None:
            blocks[block] = xxhash.xxh3_128_digest(content.data)

    with closing(DirectWriter(path)) as file, Behind(settle) as settling, Behind(file.write) as writing:

        def put(content: Bytes, block: Block | None = None, summed: Summed | None = None) -> None:
            settling.put((content, block, summed))
            writing.put(content)

        def put_next() -> None:
            block, change, first, before, computed = late.popleft()
            after, part = computed.result()
            tally.add(part)
            summed = Summed(block[0], change, first, before, after) if change else None
            put(after.contiguous().flatten().view(torch.uint8).numpy(), block, summed)
            written(after.nbytes)

        late = deque[tuple[Block, Change | None, int, Tensor, Future[tuple[Tensor, Tally]]]]()
        put(np.frombuffer(out.header(), np.uint8))
        for name, (slot, spans) in out.tensors.items():
            above = 0  # rows of the spans before
            for span in spans:
                tally.change += (span.change and span.change.square) or 0.0
                size = span.source.slots[span.name].dtype.itemsize
                for first, last in span.blocks(READ // size):
                    if len(late) == AT_ONCE:
                        put_next()
                    before = span.source.rows(span.name, first, last)
                    computed = sums.submit(_after, span, first, before, slot.dtype)
                    block = name, above + first - span.first, above + last - span.first
                    late.append((block, span.change, first - span.first, before, computed))
                above += span.last - span.first
        while late:
            put_next()
        settling.wait()
        writing.wait()
        file.finish()
    return Written(digest.hexdigest(), blocks)


@torch.no_grad()
def _after(span: Span, first: int, before: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tally]:
    """The span's rows ``before``, from ``first`` on, as they are written: [n, columns] in ``dtype``; what happened."""
    tally, last = Tally(), first + len(before)
    if span.change is None:
        after = before.to(dtype)
        finite = not span.used or is_finite(after)
    else:
        room = ROOMS.take(before.numel() * dtype.itemsize)
        after, finite = torch.from_numpy(room).view(dtype).view(before.shape), True
        linear = span.change.square is not None
        exact = span.change if linear else Change(span.change.terms, torch.float64)
        for a, b in Span(span.source, span.name, first, last).blocks(WORK):
            rows = slice(a - first, b - first)
            total = worked(before[rows], torch.float32)
            span.change.add_(total, a - span.first)
            if not linear:
                tally.change += _square(total - before[rows])
            after[rows] = total
            rounding = partial(_rounding, before[rows], exact, a - span.first)
            finite &= math.isfinite(tally.weights(total, after[rows], rounding))
    if not finite:
        reason = f"not finite in {dtype}: it overflows" if is_finite(before) else "NaN or infinity in the base"
        raise ModelError(reason, where=span.name)
    return after, tally

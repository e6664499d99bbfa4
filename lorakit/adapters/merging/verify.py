"""A merge proved: every sum is right in float64, and every byte that was written is read back from the disk."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from lorakit.adapters.merging.change import Change, rows_at_once
from lorakit.adapters.merging.source import FileSource
from lorakit.adapters.merging.stream import Block, OutFile, Summed, Written, worked
from lorakit.errors import ModelError
from lorakit.storage.disk import fsync

SINGLE = 2.0**-24
"""Half a unit in the last place of float32, in which the sums were made."""


HINT = "the merged model was removed; check the disk and the memory, then merge again"


@dataclass(frozen=True)
class Checked:
    """What verifying found."""

    changed: int
    """Changed tensors, or parts of one, recomputed in float64."""
    worst: float
    """Largest error as a share of what one float32 sum and one rounding may cost."""


class Proof:
    """Recomputes in float64 what was summed, while it is in memory.

    A weight may differ from its float64 sum by half a unit in the last place of its dtype and the float32 sum's own
    error. That the very same bytes are on the disk is for ``ReadBack`` to say.
    """

    def __init__(self) -> None:
        self._changed, self._worst = 0, 0.0
        self._last: tuple[str, Change, Change] | None = None

    @property
    def checked(self) -> Checked:
        return Checked(self._changed, self._worst)

    @torch.no_grad()
    def __call__(self, summed: Summed) -> None:
        """Raises ModelError naming the tensor whose rows are not base + adapter."""
        if self._last is None or self._last[0] != summed.name or self._last[1] is not summed.change:
            self._last = summed.name, summed.change, Change(summed.change.terms, torch.float64)
            self._changed += 1
        error = _error(summed, self._last[2])
        if not error <= 1:
            told = f"{error:.3g} times as far from base + adapter as rounding may be"
            raise ModelError(f"does not verify: {told}", where=summed.name, hint=HINT)
        self._worst = max(self._worst, error)


class ReadBack:
    """A written file as the disk has it, to be read like any: a block that is not what was written is an error."""

    def __init__(self, path: Path, out: OutFile, written: Written, go_on: Callable[[int], None]) -> None:
        """``go_on`` is told the bytes of each block that was read. Raises ModelError for another header or size."""
        forget(path)
        self._file = FileSource(path, fresh=True)
        self.slots, self.metadata = self._file.slots, self._file.metadata
        self._path, self._go_on = path, go_on
        self._left: dict[Block, bytes] = dict(written.blocks)
        header = out.header()
        with path.open("rb") as file:
            if file.read(len(header)) != header:
                reason = "does not verify: the file's header is not the one that was planned"
                raise ModelError(reason, where=path.name, hint=HINT)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """[last - first, columns], not to be written to; as it was written where it is a block that was."""
        content = self._file.rows(name, first, last)
        digest = self._left.pop((name, first, last), None)
        if digest is not None:
            if xxhash.xxh3_128_digest(content.view(torch.uint8).numpy().data) != digest:
                reason = "does not verify: it does not read back as it was written"
                raise ModelError(reason, where=f"{self._path.name}: {name}", hint=HINT)
            self._go_on(content.nbytes)
        return content

    def finish(self, _: object = None) -> None:
        """Read what nobody has asked for yet. Raises ModelError."""
        for block in list(self._left):
            self.rows(*block)


def _error(summed: Summed, exact: Change) -> float:
    """The largest error among some rows, as a share of the allowed one; or no less than it."""
    worst, columns = 0.0, summed.before.shape[1]
    for a in range(0, len(summed.before), step := rows_at_once(columns)):
        weight, written = summed.before[a : a + step], summed.after[a : a + step]
        total = worked(weight, torch.float64)
        exact.add_(total, summed.first + a)
        largest = _one_rounding(total, written)
        if not largest <= 1:
            allowed = exact.bound(weight.double(), total, summed.first + a).mul_(SINGLE)
            allowed.add_(total.abs(), alpha=_half_unit(written.dtype)).add_(torch.finfo(written.dtype).smallest_normal)
            largest = float(total.sub_(written).abs_().div_(allowed).max())
        worst = largest if not largest <= worst else worst
    return worst


def _half_unit(dtype: torch.dtype) -> float:
    """The largest error of a rounding as a share of the rounded number, and a little more."""
    return torch.finfo(dtype).eps / 2 * (1 + 2.0**-6)


def _one_rounding(total: Tensor, found: Tensor) -> float:
    """The largest error as a share of ``_half_unit``, which nearly all sums in bfloat16 keep to; in two passes."""
    if found.dtype != torch.bfloat16:
        return float("inf")
    least, most = torch.aminmax(found.float().div_(total.float()))  # float32 blurs it by far less than it allows
    return max(1 - float(least), float(most) - 1) / _half_unit(found.dtype)


def forget(path: Path) -> None:
    """Write a file through to the disk and drop it from the page cache, so that reading reads the disk."""
    fsync(path)
    handle = os.open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # a file system without a cache of its own
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)

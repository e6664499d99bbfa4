"""A merged file read back from the disk: every byte that was written is there, and every sum is right in float64."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorakit.adapters.change import WORK, Change
from lorakit.adapters.source import FileSource
from lorakit.adapters.stream import READ, OutFile, Span, worked
from lorakit.errors import ModelError
from lorakit.storage.atomic import sha256
from lorakit.storage.bases import file_digest

SINGLE = 2.0**-24
"""Half a unit in the last place of float32, in which the sums were made."""


ALTERED = "the file does not read back as it was written"


@dataclass(frozen=True)
class Checked:
    """What reading back found."""

    changed: int
    """Changed tensors, or parts of one, recomputed in float64."""
    worst: float
    """Largest error as a share of what one float32 sum and one rounding may cost."""


def verify_file(path: Path, out: OutFile, digest: str, go_on: Callable[[int], None]) -> Checked:
    """Hold a file against its plan, tensor by tensor; ``digest`` is the SHA-256 of what was written.

    A changed weight may differ from its float64 sum by half a unit in the last place of its dtype and the float32 sum's
    own error; every other tensor must be the base's, converted where the plan says so.

    Raises ModelError naming the tensor.
    """
    forget(path)
    found = FileSource(path, fresh=True)
    if found.slots != {name: target.slot for name, target in out.tensors.items()}:
        raise ModelError("the file's header is not the one that was planned", where=path.name)
    try:
        checked = _check(found, out, go_on)
    except ModelError as error:
        if sha256(path) == digest:
            raise
        raise ModelError(ALTERED, where=path.name) from error
    if file_digest(path).hex() != digest:
        raise ModelError(ALTERED, where=path.name)
    return checked


def _check(found: FileSource, out: OutFile, go_on: Callable[[int], None]) -> Checked:
    """Every tensor of a file against its plan; ModelError naming the first that is wrong."""
    weights, worst = 0, 0.0
    for name, target in out.tensors.items():
        start = 0
        for span in target.spans:
            weights += span.change is not None
            exact = None if span.change is None else Change(span.change.terms, torch.float64)
            size = span.source.slots[span.name].dtype.itemsize
            for first, last in span.blocks(READ // size):
                rows = found.rows(name, start + first - span.first, start + last - span.first)
                error = _error(span, exact, first, last, rows.view(last - first, -1))
                if not error <= 1:
                    raise ModelError(
                        f"{error:.3g} times as far from base + adapter as rounding may be"
                        if exact is not None
                        else "not the base's tensor",
                        where=name,
                    )
                worst = max(worst, error)
                go_on(rows.nbytes)
            start += span.last - span.first
    return Checked(weights, worst)


def _error(span: Span, exact: Change | None, first: int, last: int, found: Tensor) -> float:
    """The largest error among some rows, as a share of the allowed one; or no less than it."""
    before = span.source.rows(span.name, first, last)
    if exact is None:
        return 0.0 if _same_bytes(before.to(found.dtype).view(found.shape), found) else float("inf")
    worst = 0.0
    for a, b in Span(span.source, span.name, first, last).blocks(WORK):
        weight, written = before[a - first : b - first], found[a - first : b - first]
        total = worked(weight, torch.float64)
        exact.add_(total, a - span.first)
        largest = _one_rounding(total, written)
        if not largest <= 1:
            allowed = exact.bound(weight.double(), total, a - span.first).mul_(SINGLE)
            allowed.add_(total.abs(), alpha=_half_unit(found.dtype)).add_(torch.finfo(found.dtype).smallest_normal)
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
    least, most = torch.aminmax(found.double().div_(total))
    return max(1 - float(least), float(most) - 1) / _half_unit(found.dtype)


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def forget(path: Path) -> None:
    """Write a file through to the disk and drop it from the page cache, so that reading reads the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)

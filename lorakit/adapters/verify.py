"""A merged file read back from the disk: every byte that was written is there, and every sum is right in float64."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorakit.adapters.change import Change
from lorakit.adapters.source import FileSource
from lorakit.adapters.stream import READ, WORK, OutFile, Span
from lorakit.errors import ModelError

SINGLE = 2.0**-24
"""Half a unit in the last place of float32, in which the sums were made."""


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
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            raise ModelError("the file does not read back as it was written", where=path.name)
    found = FileSource(path)
    if found.slots != {name: target.slot for name, target in out.tensors.items()}:
        raise ModelError("the file's header is not the one that was planned", where=path.name)
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
    """The largest error among some rows, as a share of the allowed one."""
    before = span.source.rows(span.name, first, last)
    if exact is None:
        return 0.0 if _same_bytes(before.to(found.dtype).view(found.shape), found) else float("inf")
    worst = 0.0
    for a, b in Span(span.source, span.name, first, last).blocks(WORK):
        weight = before[a - first : b - first].double()
        total = exact.rows(weight, a - span.first)
        allowed = total.abs() * (torch.finfo(found.dtype).eps / 2 * (1 + 2.0**-6))
        allowed += exact.bound(weight, total, a - span.first) * SINGLE + torch.finfo(found.dtype).smallest_normal
        error = total.sub_(found[a - first : b - first]).abs_().div_(allowed)
        largest = float(error.max())
        worst = largest if not largest <= worst else worst
    return worst


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

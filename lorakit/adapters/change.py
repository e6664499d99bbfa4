"""What any number of adapters do to one tensor together, a few of its rows at a time."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.adapters.delta import Delta
from lorakit.adapters.source import Source
from lorakit.errors import ModelError


class Whole(NamedTuple):
    """A tensor that takes a base's place: a module trained whole, or a trained bias."""

    source: Source
    name: str


Term = tuple[Delta | Whole, float]
"""What one adapter does, and how often it is taken."""


class Change:
    """The sum of what adapters do to one tensor, each taken ``weight`` times, in ``dtype``.

    LoRA: W + sum_i weight_i scale_i B_i A_i. A whole tensor S adds weight (S - W). DoRA, alone on its weight: V = the
    sum above, then each row of V scaled to the norm ``magnitude``, whatever the weight, as in ``inject.set_scale``.
    ModelError when DoRA meets another change.
    """

    def __init__(self, terms: Sequence[Term], dtype: torch.dtype = torch.float32) -> None:
        self.terms, self.dtype = tuple(terms), dtype
        deltas = [(what, weight) for what, weight in terms if isinstance(what, Delta)]
        magnitudes = [delta.magnitude for delta, _ in deltas if delta.magnitude is not None]
        if magnitudes and len(terms) > 1:
            raise ModelError("an adapter with DoRA does not add up with another", hint="merge one of them first")
        self.magnitude = magnitudes[0].to(dtype) if magnitudes else None
        self.whole = [(what, weight) for what, weight in terms if isinstance(what, Whole)]
        self.A = self.B = None
        if deltas:
            self.A = torch.cat([delta.A.flatten(1).to(dtype) for delta, _ in deltas])
            self.B = torch.cat([delta.B.flatten(1).to(dtype) * (weight * delta.scale) for delta, weight in deltas], 1)

    @property
    def shapes(self) -> set[tuple[int, int]]:
        """Rows and columns of each part; one pair when they fit each other."""
        found = {(slot.rows, slot.columns) for whole, _ in self.whole for slot in [whole.source.slots[whole.name]]}
        return found if self.A is None or self.B is None else found | {(self.B.shape[0], self.A.shape[1])}

    def rows(self, weight: Tensor, first: int) -> Tensor:
        """The changed rows [n, columns] in ``dtype``, for ``weight`` [n, columns] in ``dtype``, from ``first`` on."""
        last = first + weight.shape[0]
        total = weight
        if self.whole:
            kept = 1 - sum(share for _, share in self.whole)
            total = weight * kept if kept else torch.zeros_like(weight)
            for whole, share in self.whole:
                total = total.add_(whole.source.rows(whole.name, first, last).to(self.dtype), alpha=share)
        if self.A is not None and self.B is not None:
            total = torch.addmm(total, self.B[first:last], self.A)
        if self.magnitude is None:
            return total
        norm: Tensor = torch.linalg.vector_norm(total, dim=1)
        ratio = self.magnitude[first:last] / norm
        return total * ratio[:, None]

    def bound(self, weight: Tensor, total: Tensor, first: int) -> Tensor:
        """How many units of float32's rounding the sum ``total`` that ``rows`` gave may be off: [n, columns].

        At most r + 4 roundings of terms no larger than |W| + |B| |A|, which Cauchy-Schwarz puts under the norms of a
        row of B and a column of A; DoRA scales them and adds the roundings of a norm.
        """
        last = first + weight.shape[0]
        bound = weight.abs() + total.abs()
        if self.A is not None and self.B is not None:
            rows, columns = torch.linalg.vector_norm(self.B[first:last], dim=1), torch.linalg.vector_norm(self.A, dim=0)
            bound = torch.addr(bound, rows, columns) * (self.A.shape[0] + 4)
        if self.magnitude is None or self.A is None or self.B is None:
            return bound
        norm = torch.linalg.vector_norm(torch.addmm(weight, self.B[first:last], self.A), dim=1)
        bound *= (self.magnitude[first:last].abs() / norm)[:, None]
        spread: Tensor = total.abs() * (weight.shape[1] ** 0.5 + 4)
        return bound + spread

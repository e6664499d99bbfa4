"""What any number of adapters do to one tensor together, a few of its rows at a time."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.adapters.delta import Delta
from lorakit.adapters.merging.source import Source
from lorakit.errors import ModelError

WORK = 128 << 10
"""Elements that are summed at a time: few enough to stay in a core's cache."""


class Whole(NamedTuple):
    """A tensor that takes a base's place: a module trained whole, or a trained bias."""

    source: Source
    name: str


class Rows(NamedTuple):
    """Single rows that take the place of a base's."""

    indices: Tensor
    """int64 [n]."""
    values: Tensor
    """[n, columns]."""
    height: int
    """Rows of the base's tensor."""

    def inside(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Of the base's rows ``first`` to ``last``: which these replace, counted from ``first``, and by what."""
        inside = (self.indices >= first) & (self.indices < last)
        return self.indices[inside] - first, self.values[inside]


Term = tuple[Delta | Whole | Rows, float]
"""What one adapter does, and how often it is taken."""


def not_alone() -> ModelError:
    """For DoRA beside what it does not add up with."""
    return ModelError("an adapter with DoRA does not add up with another", hint="merge one of them first")


class Change:
    """The sum of what adapters do to one tensor, each taken ``weight`` times, in ``dtype``.

    LoRA: W + sum_i weight_i scale_i B_i A_i. A whole tensor S, or some rows of one, adds weight (S - W). DoRA, of one
    adapter that may bring S too: V = the sum above, then each row of V scaled to the norm ``magnitude``, whatever the
    weight, as in ``inject.set_scale``.
    ModelError when DoRA meets other LoRA, or single rows.
    """

    def __init__(self, terms: Sequence[Term], dtype: torch.dtype = torch.float32) -> None:
        self.terms, self.dtype = tuple(terms), dtype
        deltas = [(what, weight) for what, weight in terms if isinstance(what, Delta)]
        magnitudes = [delta.magnitude for delta, _ in deltas if delta.magnitude is not None]
        self.whole = [(what, weight) for what, weight in terms if isinstance(what, Whole)]
        self.parts = [(what, weight) for what, weight in terms if isinstance(what, Rows)]
        if magnitudes and (len(deltas) > 1 or self.parts):
            raise not_alone()
        self.magnitude = magnitudes[0].to(dtype) if magnitudes else None
        self.products = [
            (delta.B.flatten(1).to(dtype), delta.A.flatten(1).to(dtype), weight * delta.scale)
            for delta, weight in deltas
        ]

    @property
    def shapes(self) -> set[tuple[int, int]]:
        """Rows and columns of each part; one pair when they fit each other."""
        slots = [whole.source.slots[whole.name] for whole, _ in self.whole]
        parts = {(part.height, part.values.shape[1]) for part, _ in self.parts}
        products = {(b.shape[0], a.shape[1]) for b, a, _ in self.products}
        return {(slot.rows, slot.columns) for slot in slots} | parts | products

    @cached_property
    def square(self) -> float | None:
        """Squared norm of what LoRA adds, from the small A A^T and B^T B; None where something else changes too."""
        if self.whole or self.parts or self.magnitude is not None:
            return None
        products = [(b.double(), a.double(), scale) for b, a, scale in self.products]
        found = sum(
            one * other * float(((b.T @ d) * (a @ c.T)).sum()) for b, a, one in products for d, c, other in products
        )
        return max(found, 0.0)

    @cached_property
    def _columns(self) -> list[Tensor]:
        """The norm of each column of each A."""
        return [torch.linalg.vector_norm(a, dim=0) for _, a, _ in self.products]

    def add_(self, rows: Tensor, first: int) -> None:
        """Change rows [n, columns] of the base's tensor, in ``dtype``, from ``first`` on, where they are."""
        self._sum_(rows, first)
        if self.magnitude is not None:
            norm: Tensor = torch.linalg.vector_norm(rows, dim=1)
            rows.mul_((self.magnitude[first : first + len(rows)] / norm)[:, None])

    def _sum_(self, rows: Tensor, first: int) -> None:
        """``add_`` without DoRA's magnitude."""
        last = first + rows.shape[0]
        places = [(*part.inside(first, last), share) for part, share in self.parts]
        parts = [(at, rows[at], values.to(self.dtype), share) for at, values, share in places]
        if self.whole:
            kept = 1 - sum(share for _, share in self.whole)
            rows.mul_(kept) if kept else rows.zero_()
            for whole, share in self.whole:
                rows.add_(whole.source.rows(whole.name, first, last).to(self.dtype), alpha=share)
        for b, a, scale in self.products:
            rows.addmm_(b[first:last], a, alpha=scale)
        for at, before, after, share in parts:
            rows.index_copy_(0, at, rows[at] - share * before + share * after)

    def added(self, weight: Tensor) -> Tensor:
        """A whole weight with the change, float32 in its shape: block for block the sums that a merge makes."""
        total = weight.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        rows = total.view(len(total), -1)
        for first in range(0, len(rows), step := rows_at_once(rows.shape[1])):
            self.add_(rows[first : first + step], first)
        return total

    def bound(self, weight: Tensor, total: Tensor, first: int) -> Tensor:
        """How many units of float32's rounding the sum ``total`` that ``add_`` made may be off: [n, columns].

        At most r + 4 roundings of terms no larger than |W| + |B| |A|, which Cauchy-Schwarz puts under the norms of a
        row of B and a column of A, and three more of each |weight S| and |weight W| where a tensor or its rows take
        W's place; DoRA scales them and adds the roundings of a norm.
        """
        last = first + weight.shape[0]
        bound = weight.abs() + total.abs()
        for whole, share in self.whole:
            bound.add_(weight.abs() + whole.source.rows(whole.name, first, last).double().abs(), alpha=abs(share))
        for part, share in self.parts:
            at, values = part.inside(first, last)
            bound.index_add_(0, at, weight[at].abs() + values.double().abs(), alpha=abs(share))
        rank = 3 * (len(self.whole) + len(self.parts))
        for (b, a, scale), columns in zip(self.products, self._columns, strict=True):
            rows = torch.linalg.vector_norm(b[first:last], dim=1)
            bound = torch.addr(bound, rows, columns, alpha=abs(scale))
            rank += a.shape[0]
        bound *= rank + 4
        if self.magnitude is None:
            return bound
        directions = weight.clone()
        self._sum_(directions, first)
        bound *= (self.magnitude[first:last].abs() / torch.linalg.vector_norm(directions, dim=1))[:, None]
        spread: Tensor = total.abs() * (weight.shape[1] ** 0.5 + 4)
        return bound + spread


def rows_at_once(columns: int) -> int:
    """Rows that are summed at a time."""
    return max(1, WORK // max(1, columns))

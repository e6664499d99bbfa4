"""What a merged model computes beside base + adapter, and how far apart the two may be."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.adapters.merging.parallel import Crew
from lorakit.errors import ModelError

TIMES = 3
"""How many times as far as random errors of rounding's size: honest merges were 0.3 to 1.4 times as far."""
LEAST = 1e-3
"""What is always allowed: sums in float32 come in another order."""


class Comparison(NamedTuple):
    """Two models' outputs for the same inputs, base + adapter's spread around its mean being 1."""

    difference: float
    """Root mean square of merged - (base + adapter)."""
    rounding: float
    """The same between base + adapter with and without random errors of the size of rounding."""
    told: str
    """What was compared and what came of it, in words."""

    @property
    def allowed(self) -> float:
        return max(LEAST, TIMES * self.rounding)


Outputs = tuple[list[Tensor], list[Tensor], list[Tensor]]
"""Tensors [rows, ...] of base + adapter, the same with random errors, and of the merged model."""


def side_by_side(crew: Crew, expected: Callable[[], list[Tensor]], merged: Callable[[], list[Tensor]]) -> Outputs:
    """Run both, one core each. ``expected`` has the outputs with random errors behind the others.

    Raises ModelError when base + adapter has an output that is not finite.
    """

    def run(model: Callable[[], list[Tensor]]) -> list[Tensor]:
        with torch.inference_mode():
            return model()

    both, found = crew.run([lambda _: run(expected), lambda _: run(merged)])
    right, rounded = both[: len(found)], both[len(found) :]
    if not all(bool(torch.isfinite(one).all()) for one in right):
        raise ModelError("base + adapter has outputs that are not finite: there is nothing to compare with")
    return right, rounded, found


def difference(reference: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Of tensors [rows, ...]: root mean square of found - reference as a share of the
    reference's own spread around its mean."""
    pairs = [pair for one, other in zip(reference, found, strict=True) for pair in zip(one, other, strict=True)]
    count = sum(one.numel() for one, _ in pairs)
    mean = sum(float(one.double().sum()) for one, _ in pairs) / count
    spread = sum(float((one.double() - mean).square().sum()) for one, _ in pairs)
    error = sum(float((other.double() - one).square().sum()) for one, other in pairs)
    return math.sqrt(error / max(spread, 1e-300))

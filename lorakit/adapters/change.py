"""What any number of adapters do to one weight together: W + sum of weight * scale * B A, row by row."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.adapters.delta import Delta
from lorakit.errors import ModelError


class Change:
    """The sum of low-rank changes of one weight, each taken ``weight`` times, in ``dtype``.

    LoRA: W + sum_i weight_i scale_i B_i A_i. DoRA, alone on its weight: V = that same sum, then each row of V scaled
    to the norm ``magnitude``, whatever the weight, as in ``inject.set_scale``.
    ModelError when DoRA meets another change.
    """

    def __init__(self, deltas: Sequence[tuple[Delta, float]], dtype: torch.dtype = torch.float32) -> None:
        self.deltas, self.dtype = tuple(deltas), dtype
        magnitudes = [delta.magnitude for delta, _ in deltas if delta.magnitude is not None]
        if magnitudes and len(deltas) > 1:
            raise ModelError("an adapter with DoRA does not add up with another", hint="merge one of them first")
        self.magnitude = magnitudes[0].to(dtype) if magnitudes else None
        self.A = torch.cat([delta.A.flatten(1).to(dtype) for delta, _ in deltas])
        """[sum of r, columns]"""
        self.B = torch.cat([delta.B.flatten(1).to(dtype) * (weight * delta.scale) for delta, weight in deltas], 1)
        """[rows, sum of r]"""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight."""
        return self.B.shape[0], self.A.shape[1]

    def rows(self, weight: Tensor, first: int) -> Tensor:
        """The changed rows [n, columns] in ``dtype``, for ``weight`` [n, columns] in ``dtype``, from ``first`` on."""
        last = first + weight.shape[0]
        total = torch.addmm(weight, self.B[first:last], self.A)
        if self.magnitude is None:
            return total
        norm: Tensor = torch.linalg.vector_norm(total, dim=1)
        return total.mul_((self.magnitude[first:last] / norm)[:, None])

"""What rounding its weights may do to a model's outputs: an error of rounding's size in rounding's place.

How far a merged model may be from base + adapter depends on the model: a deep one carries an error on that a shallow
one does not. So the model itself is asked, with random errors E of the same size as those of rounding, in as many rows
of its batch as it has without them.
"""

import math
import zlib
from typing import NamedTuple

import torch
from torch import Tensor

RANK = 16
"""Of E, so that it costs what LoRA costs. norm(E x) is in the mean what it is for independent errors."""

_SHARE = 0.2
"""Root mean square of a rounding error as a share of eps * the weights' own: eps / sqrt(12) of the power of two below
a weight, which is 0.68 of the weight in the root mean square when mantissas have Benford's law (0.196 together)."""


class RandomError(NamedTuple):
    """E = B A, each entry of which has the variance 1."""

    A: Tensor
    """[RANK, in, ...]"""
    B: Tensor
    """[out, RANK]"""


def random_error(name: str, shape: tuple[int, ...]) -> RandomError:
    """For a weight [out, in, ...], the same for the same ``name``."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    a = torch.randn(RANK, *shape[1:], generator=generator)
    return RandomError(a, torch.randn(shape[0], RANK, generator=generator) / math.sqrt(RANK))


def error_of(dtype: torch.dtype, square: float, count: int) -> float:
    """Standard deviation of rounding ``count`` weights with the sum of squares ``square`` to ``dtype``."""
    info = torch.finfo(dtype)
    least = info.eps * info.smallest_normal / math.sqrt(12)  # of the smallest numbers, which lie evenly
    return math.hypot(_SHARE * info.eps * math.sqrt(square / max(1, count)), least)


def small_error(dtype: torch.dtype, name: str, tensor: Tensor) -> Tensor:
    """An error for all of a small tensor, such as a bias or a norm's weight."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    size = error_of(dtype, float(tensor.square().sum()), tensor.numel())
    return size * torch.randn(tensor.shape, generator=generator)

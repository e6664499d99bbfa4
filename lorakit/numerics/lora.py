"""The LoRA linear layer as one autograd function, and the adapter's part alone for a layer that is quantized.

Shapes: ``I`` features in, ``O`` features out, ``r`` rank; ``...`` are the same leading dimensions throughout.

    z = x W^T + scale * drop(x) A^T B^T
    y = z + b                                   LoRA  (Hu et al. 2021, arXiv:2106.09685)
    y = m / |W + scale * B A| * z + b           DoRA  (Liu et al. 2024, arXiv:2402.09353; rows' norms, a constant)

W and b are frozen, so x is kept for the backward pass as it came, without a copy, and no gradient of W is formed. A, B
and m are float32 masters: they are cast to x's dtype here, and their gradients come back in float32.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Magnitude(NamedTuple):
    """DoRA's: ``m`` [O], trained, and ``squares`` [O], the squared norms of W's rows in m's dtype."""

    m: Tensor
    squares: Tensor


def row_squares(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Squared norm of each row of a weight [O, ...], summed in ``dtype``: [O]."""
    return weight.detach().to(dtype).flatten(1).square().sum(1)


def lora_linear(
    x: Tensor,
    base: tuple[Tensor, Tensor | None],
    low_rank: tuple[Tensor, Tensor],
    scale: float,
    dropout: float = 0.0,
    magnitude: Magnitude | None = None,
) -> Tensor:
    """y [..., O] in x's dtype.

    Args:
        x: [..., I].
        base: W [O, I] and b [O] or None, frozen, of x's dtype.
        low_rank: A [r, I] and B [O, r].
        dropout: share of x's numbers that A does not see, the others divided by 1 - share; 0 outside training.
        magnitude: DoRA's.

    Raises:
        ValueError: W or b asks for a gradient.
    """
    if any(tensor is not None and tensor.requires_grad for tensor in base):
        raise ValueError("lora_linear gives no gradient to the base; freeze it")
    m, factor = None, None
    if magnitude is not None:
        m = magnitude.m
        factor = norms(base[0], low_rank, scale, magnitude.squares).reciprocal()
    out: Tensor = _LoraLinear.apply(x, *base, *low_rank, _kept(x, dropout), scale / (1 - dropout), m, factor)
    return out


def lora_added(x: Tensor, y: Tensor, low_rank: tuple[Tensor, Tensor], scale: float, dropout: float = 0.0) -> Tensor:
    """y + scale * drop(x) A^T B^T, of y's shape and dtype, for y [..., O] that a layer made of x [..., I] by weights
    that are its own affair. Arguments as of ``lora_linear``."""
    out: Tensor = _LoraAdded.apply(x, y, *low_rank, _kept(x, dropout), scale / (1 - dropout))
    return out


def _kept(x: Tensor, dropout: float) -> Tensor | None:
    """Which numbers of x A sees; None for all."""
    if not dropout:
        return None
    return torch.empty_like(x, dtype=torch.bool, memory_format=torch.contiguous_format).bernoulli_(1 - dropout)


def norms(weight: Tensor, low_rank: tuple[Tensor, Tensor], scale: float, squares: Tensor) -> Tensor:
    """|W + scale * B A| by rows [O], without forming the sum, from ``squares`` = |W|^2 [O] and

    |W + s B A|^2 = |W|^2 + 2 s B . (W A^T) + s^2 B . (B A A^T), where . sums over a row.
    """
    with torch.no_grad():
        a, b = low_rank
        cross = (weight @ a.to(weight.dtype).T).to(b.dtype)
        return (squares + (b * (2 * scale * cross + scale**2 * (b @ (a @ a.T)))).sum(1)).clamp_min(0).sqrt()


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        keep: Tensor | None,
        scale: float,
        m: Tensor | None,
        factor: Tensor | None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        a, b = a.to(x.dtype), b.to(x.dtype)
        u = _seen(rows, keep) @ a.T
        y = functional.linear(rows, weight, bias if m is None else None)
        y.addmm_(u, b.T, alpha=scale)
        z = None
        if m is not None and factor is not None:
            z, y = y, y * (m * factor).to(x.dtype)
            if bias is not None:
                y += bias
        ctx.save_for_backward(rows, weight, a, b, u, keep, m, factor, z)
        ctx.scale = scale
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """With G = dL/dz and U = drop(x) A^T: dB = s G^T U, dA = s (G B)^T drop(x), dx = G W + s drop(G B A),
        dm = sum over rows of dL/dy * z / |W + s B A|, and G = m / |W + s B A| * dL/dy."""
        rows, weight, a, b, u, keep, m, factor, z = ctx.saved_tensors
        g = grads[0].reshape(-1, weight.shape[0])
        dm = None
        if m is not None:
            dm = (g * z).sum(0, dtype=m.dtype) * factor
            g = g * (m * factor).to(g.dtype)
        du, da, db = _gradients(g, rows, b, u, keep, ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = g @ weight
            if keep is None:
                dx.addmm_(du, a)
            else:
                dx += _seen(du @ a, keep)
            dx = dx.view(*grads[0].shape[:-1], weight.shape[1])
        return dx, None, None, da, db, None, None, dm, None


class _LoraAdded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, keep: Tensor | None, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        a, b = a.to(x.dtype), b.to(x.dtype)
        u = _seen(rows, keep) @ a.T
        ctx.save_for_backward(rows, a, b, u, keep)
        ctx.scale = scale
        return torch.addmm(y.reshape(len(rows), -1), u.to(y.dtype), b.to(y.dtype).T, alpha=scale).view(y.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, a, b, u, keep = ctx.saved_tensors
        g = grads[0].reshape(len(rows), -1).to(rows.dtype)
        du, da, db = _gradients(g, rows, b, u, keep, ctx.scale)
        dx = _seen(du @ a, keep).view(*grads[0].shape[:-1], a.shape[1]) if ctx.needs_input_grad[0] else None
        return dx, grads[0], da, db, None, None


def _seen(rows: Tensor, keep: Tensor | None) -> Tensor:
    return rows if keep is None else rows * keep.view_as(rows)


def _gradients(
    g: Tensor, rows: Tensor, b: Tensor, u: Tensor, keep: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/du, and dA and dB in float32 at least, of g = dL/dz."""
    du = (g @ b).mul_(scale)
    db = (g.T @ u).to(torch.promote_types(g.dtype, torch.float32)).mul_(scale)
    return du, (du.T @ _seen(rows, keep)).to(db.dtype), db

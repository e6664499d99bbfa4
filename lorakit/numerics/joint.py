"""Several frozen linear layers of the same input as one autograd function, each with LoRA or without.

Shapes: ``I`` features in, ``O_i`` features out of layer ``i``, ``r_i`` its rank, ``R`` the sum of ranks; ``...`` are
leading dimensions.

    U = x [A_1; A_2; ...]^T,    y_i = x W_i^T + b_i + scale_i * U_i B_i^T       (Hu et al. 2021, arXiv:2106.09685)

Beside layers one by one, x meets all A at once, and the input's gradient is added up inside the products instead of
once for each layer and each adapter. The W and b are frozen; A and B are float32 masters, cast to x's dtype here.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Layer(NamedTuple):
    """W [O, I] and b [O] or None, frozen, and what LoRA adds to them: A [r, I] and B [O, r]; of a layer without it r is
    0."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float

    @classmethod
    def bare(cls, weight: Tensor, bias: Tensor | None) -> "Layer":
        """One without LoRA."""
        outputs, inputs = weight.shape
        return cls(weight, bias, weight.new_empty(0, inputs), weight.new_empty(outputs, 0), 0.0)


def joint_linear(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """Each layer's y [..., O_i] of x [..., I], in x's dtype.

    Raises ValueError when a W or b asks for a gradient.
    """
    for layer in layers:
        if layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad):
            raise ValueError("joint_linear gives no gradient to a base; freeze it")
    weights, biases, downs, ups, scales = zip(*layers, strict=True)
    ys: tuple[Tensor, ...] = _Joint.apply(x, scales, *weights, *biases, *downs, *ups)
    return ys


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], *tensors: Any) -> tuple[Tensor, ...]:
        count = len(scales)
        weights, biases, downs, ups = (tensors[i : i + count] for i in range(0, 4 * count, count))
        rows, ranks = x.reshape(-1, x.shape[-1]), [len(a) for a in downs]
        a, ups = torch.cat(downs).to(x.dtype), tuple(b.to(x.dtype) for b in ups)
        u = rows @ a.T
        ys = [functional.linear(rows, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        for y, part, b, scale in zip(ys, u.split(ranks, 1), ups, scales, strict=True):
            y.addmm_(part, b.T, alpha=scale)
        ctx.save_for_backward(rows, a, u, *weights, *ups)
        ctx.scales, ctx.ranks, ctx.shape = scales, ranks, x.shape
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """dU_i = scale_i dy_i B_i, dA = dU^T x, dB_i = scale_i dy_i^T U_i, dx = sum_i dy_i W_i + dU A."""
        rows, a, u, *tensors = ctx.saved_tensors
        count = len(grads)
        weights, ups = tensors[:count], tensors[count:]
        wide = torch.promote_types(u.dtype, torch.float32)
        gs, du, d_ups = [g.reshape(-1, g.shape[-1]) for g in grads], torch.empty_like(u), []
        splits = (x.split(ctx.ranks, 1) for x in (du, u))
        for g, d_part, part, b, scale in zip(gs, *splits, ups, ctx.scales, strict=True):
            torch.mul(g @ b, scale, out=d_part)
            d_ups.append((g.T @ part).to(wide).mul_(scale))
        d_downs = (du.T @ rows).to(wide).split(ctx.ranks)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = gs[0] @ weights[0]
            for g, weight in zip([*gs[1:], du], [*weights[1:], a], strict=True):
                dx.addmm_(g, weight)
            dx = dx.view(ctx.shape)
        return dx, None, *[None] * (2 * count), *d_downs, *d_ups

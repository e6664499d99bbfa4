"""What stands between the matmuls of a LLaMA-type block, each as one autograd function that keeps little and makes few
passes over memory.

Shapes: ``...`` are leading dimensions, ``W`` width, ``D`` head dim.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv:1910.07467), the mean at least in float32.

    Args:
        x: [..., W].
        weight: [W], frozen.
        eps: added to the mean square.

    Returns:
        [..., W] in x's dtype, rounded to it before the product with ``weight``, as transformers does, or on a GPU once.

    Raises:
        ValueError: the weight asks for a gradient.
    """
    if weight.requires_grad:
        raise ValueError("rms_norm gives no gradient to its weight; freeze it")
    if _is_one_kernel(x):
        return functional.rms_norm(x, weight.shape, weight, eps)
    out: Tensor = _RMSNorm.apply(x, weight, eps)
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202), all of one shape and dtype; silu is not kept but computed again
    in the backward pass."""
    out: Tensor = _SwiGLU.apply(gate, up)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864): each pair (x[i], x[i + D/2]) turned by its angle.

    Args:
        x: [..., D].
        cos: broadcast to x.
        sin: likewise, the first half negated, the second as it is (``signed``).

    Returns:
        x * cos + swap(x) * sin in x's dtype, where swap exchanges the halves.
    """
    out: Tensor = _Rotate.apply(x, cos, sin)
    return out


def signed(sin: Tensor) -> Tensor:
    """The sines [..., D] as ``rotate`` takes them: the first half negated."""
    first, second = sin.chunk(2, -1)
    return torch.cat([-first, second], -1)


def _is_one_kernel(x: Tensor) -> bool:
    """Whether PyTorch computes an RMSNorm, and its gradient, by one kernel each: on CUDA (pytorch/pytorch#153666)."""
    return x.is_cuda


def _wide(x: Tensor) -> Tensor:
    """A copy, float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        factor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        return wide.mul_(factor).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """With n = x * factor and g = weight * dy: dx = factor * (g - n * mean(g * n))."""
        x, weight, factor = ctx.saved_tensors
        normed, g = _wide(x).mul_(factor), _wide(grads[0]).mul_(weight)
        mean = (g * normed).mean(-1, keepdim=True)
        return g.addcmul_(normed, mean, value=-1).mul_(factor).to(x.dtype), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_up = functional.silu(gate).mul_(grads[0])
        return torch.ops.aten.silu_backward(grads[0] * up, gate), d_up


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The turn by the angle's negative."""
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin, value=direction)

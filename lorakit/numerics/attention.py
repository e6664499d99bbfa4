"""Attention without a mask, and which kernel is the fast one.

Shapes: ``N`` leading dimensions flattened, ``T`` queries, ``S`` tokens attended to, ``D`` head dim, ``b`` query rows of
a block.

    O = softmax(scale * Q K^T) V

Two kernels. PyTorch's fused one wherever it is the fast one; on a CPU in bfloat16, where up to about a thousand tokens
the fused kernel is slower than plain matmuls, ``_MatmulAttention``, which keeps the probabilities for its backward
pass. ``numerics.packing`` does the same for packed documents under a causal mask.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 256
"""Query rows at once in ``_MatmulAttention``."""

MOST_KEPT = 1 << 20
"""Most probabilities of a head, T x S, that are kept; beyond, the fused kernel."""


def full_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention without a mask: q [..., T, D], k and v [..., S, D] of the same leading dimensions -> [..., T, D]."""
    if not matmuls_are_faster(q) or q.shape[-2] * k.shape[-2] > MOST_KEPT:
        return functional.scaled_dot_product_attention(q, k, v, scale=scale)
    rows, keys, values = (x.flatten(0, -3) for x in (q, k, v))
    return matmul_attention(rows, keys, values, scale).view_as(q)


def matmuls_are_faster(q: Tensor) -> bool:
    """Whether short rows go faster by plain matmuls than by PyTorch's fused kernel: on a CPU in bfloat16."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16


def matmul_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention by plain matmuls: q [N, T, D], k and v [N, S, D] -> [N, T, D]."""
    out: Tensor = _MatmulAttention.apply(q, k, v, scale)
    return out


class _MatmulAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        kept: list[Tensor] = []
        for block in _blocks(q):
            scores = torch.baddbmm(q.new_zeros(()), q[:, block], k.transpose(1, 2), beta=0, alpha=scale)
            kept.append(scores.softmax(-1))
            out[:, block] = kept[-1] @ v
        ctx.save_for_backward(q, k, v, *(kept if any(ctx.needs_input_grad) else ()))
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """With dP = dO V^T: dS = P * (dP - rowsum(P * dP)), dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO."""
        q, k, v, *kept = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block, probabilities in zip(_blocks(q), kept, strict=True):
            rows, pull = q[:, block], grads[0][:, block]
            d_scores = torch._softmax_backward_data(pull @ v.transpose(1, 2), probabilities, -1, q.dtype)
            dq[:, block] = d_scores @ k
            dk += d_scores.transpose(1, 2) @ rows
            dv += probabilities.transpose(1, 2) @ pull
        return dq.mul_(ctx.scale), dk.mul_(ctx.scale), dv, None


def _blocks(q: Tensor) -> Iterator[slice]:
    for start in range(0, q.shape[1], BLOCK):
        yield slice(start, start + BLOCK)

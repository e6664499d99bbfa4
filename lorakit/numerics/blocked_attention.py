"""Attention without a mask in blocks that stay in the cache, for a CPU in bfloat16.

Shapes: ``N`` heads of all pictures, ``n`` heads at once, ``T`` queries, ``S`` tokens attended to, ``D`` head dim,
``b`` queries of a block.

    P = softmax(scale * Q K^T)      O = P V
    dP = dO V^T                     dS = P * (dP - rowsum(P * dP))
    dQ = scale * dS K               dK = scale * dS^T Q               dV = P^T dO

Scores are made a block at a time, forward and once more backward, and never kept. Products with few columns are slow,
so all that is D wide is computed transposed: the long side becomes the columns.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 20
"""Scores that a core makes at once: 2 MiB, about its second-level cache."""


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [N, T, D], k and v [N, S, D] -> [N, T, D]."""
    out: Tensor = _BlockedAttention.apply(q, k, v, scale)
    return out


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, kt, vt = q.contiguous(), k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1])
        for heads, rows, (scores, probabilities) in _blocks(q, kt, 2):
            _probabilities(q[heads, rows], kt[heads], scale, scores, probabilities)
            out[heads, :, rows] = vt[heads] @ probabilities.transpose(1, 2)
        ctx.save_for_backward(q, kt, vt)
        ctx.scale = scale
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, kt, vt = ctx.saved_tensors
        d_out = grads[0].contiguous()
        dq = q.new_empty(q.shape[0], q.shape[2], q.shape[1])
        # Sums over many blocks: bfloat16 would lose their last blocks.
        wide = torch.promote_types(q.dtype, torch.float32)
        dk, dv = (torch.zeros(kt.shape, dtype=wide) for _ in range(2))
        for heads, rows, (scores, probabilities, d_prob) in _blocks(q, kt, 3):
            block, d_block = q[heads, rows], d_out[heads, rows]
            _probabilities(block, kt[heads], ctx.scale, scores, probabilities)
            torch.bmm(d_block, vt[heads], out=d_prob)
            d_scores = torch._softmax_backward_data(d_prob, probabilities, -1, q.dtype, grad_input=scores)
            dq[heads, :, rows] = kt[heads] @ d_scores.transpose(1, 2)
            dk[heads] += block.transpose(1, 2) @ d_scores
            dv[heads] += d_block.transpose(1, 2) @ probabilities
        dk = dk.mul_(ctx.scale).to(q.dtype)
        return dq.mul_(ctx.scale).transpose(1, 2), dk.transpose(1, 2), dv.to(q.dtype).transpose(1, 2), None


def _probabilities(q: Tensor, kt: Tensor, scale: float, scores: Tensor, out: Tensor) -> None:
    """Into ``out`` [n, b, S], by way of ``scores`` of the same shape."""
    torch.baddbmm(scores, q, kt, beta=0, alpha=scale, out=scores)
    torch.softmax(scores, -1, out=out)


def _blocks(q: Tensor, kt: Tensor, count: int) -> Iterator[tuple[slice, slice, list[Tensor]]]:
    """Heads, at least as many as there are threads, and queries of each block, with ``count`` tensors [n, b, S] to
    write in.

    Those stay the same ones: memory that comes fresh from the system at every product costs more than the product.
    """
    queries, keys = q.shape[1], kt.shape[2]
    size = min(queries, max(1, BLOCK // keys))
    heads = min(q.shape[0], torch.get_num_threads() * max(1, BLOCK // (size * keys)))
    memory = [q.new_empty(heads * size * keys) for _ in range(count)]
    for head in range(0, q.shape[0], heads):
        for row in range(0, queries, size):
            shape = (min(heads, q.shape[0] - head), min(size, queries - row), keys)
            room = shape[0] * shape[1] * shape[2]
            yield slice(head, head + heads), slice(row, row + size), [m[:room].view(shape) for m in memory]

"""Attention: causal over a packed row, where documents stand one after the other and none sees another; and full.

Shapes: ``H`` query heads, ``K`` key-value heads, ``G = H / K`` queries a key head, ``T`` tokens of the row,
``L`` tokens of one document, ``S`` tokens attended to, ``D`` head dim, ``b`` query rows of a block.

    O = softmax(scale * Q K^T + mask) V        causal: for each document by itself

Two kernels. PyTorch's fused one wherever it is the fast one; on a CPU in bfloat16, where up to about a thousand tokens
the fused kernel is slower than plain matmuls, ``_MatmulAttention``, which keeps the probabilities for its backward
pass. Neither repeats keys for the query heads that share them, and no mask of [T, T] is ever built.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lorakit.numerics.blocked_attention import blocked_attention

BLOCK = 256
"""Query rows at once in ``_MatmulAttention``: keys beyond a block's last row are not touched."""

LONGEST_KEPT = 2048
"""Longest document whose probabilities are kept (H * L^2 / 2 numbers a layer); beyond, the fused kernel."""


def packed_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Causal attention within each document.

    Args:
        q: [H, T, D].
        k, v: [K, T, D], H a multiple of K; head ``h`` of q attends to head ``h // (H / K)``.
        lengths: tokens of each document, in order, summing to T.
        scale: factor of the scores, 1 / sqrt(D) as a rule.

    Returns:
        [H, T, D] in q's dtype.

    Raises:
        ValueError: the lengths do not sum to T, or H is not a multiple of K.
    """
    heads, tokens, width = q.shape
    key_heads = k.shape[0]
    if sum(lengths) != tokens or min(lengths) < 1:
        raise ValueError(f"document lengths {list(lengths)} do not make up a row of {tokens} tokens")
    if heads % key_heads:
        raise ValueError(f"{heads} query heads cannot share {key_heads} key heads")
    grouped = q.reshape(key_heads, heads // key_heads, tokens, width)
    parts = zip(grouped.split(list(lengths), 2), k.split(list(lengths), 1), v.split(list(lengths), 1), strict=True)
    return torch.cat([_document(*part, scale) for part in parts], 2).reshape(heads, tokens, width)


def full_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention without a mask: q [..., T, D], k and v [..., S, D] of the same leading dimensions -> [..., T, D]."""
    if not _matmuls_are_faster(q):
        return functional.scaled_dot_product_attention(q, k, v, scale=scale)
    return blocked_attention(*(x.flatten(0, -3) for x in (q, k, v)), scale).view_as(q)


def _matmuls_are_faster(q: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype == torch.bfloat16


def _document(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One document: q [K, G, L, D], k and v [K, L, D] -> [K, G, L, D]."""
    if _matmuls_are_faster(q) and q.shape[2] <= LONGEST_KEPT:
        return matmul_attention(q, k, v, scale)
    keys, values = (x.unsqueeze(1).expand(-1, q.shape[1], -1, -1) for x in (k, v))
    return functional.scaled_dot_product_attention(q, keys, values, is_causal=True, scale=scale)


def matmul_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = True) -> Tensor:
    """Attention by plain matmuls: q [K, G, L, D], k and v [K, S, D] (causal: S = L) -> [K, G, L, D]."""
    return _MatmulAttention.apply(q, k, v, scale, causal)


class _MatmulAttention(torch.autograd.Function):
    """Query heads of a key head are folded into rows: [K, G * b, D] x [K, D, keys]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        kept: list[Tensor] = []
        for start, stop, seen in _blocks(q, k, causal):
            rows, keys = q[:, :, start:stop].flatten(1, 2), k[:, :seen].transpose(1, 2)
            mask = _causal_mask(q, start, stop) if causal else q.new_zeros(())
            probabilities = torch.baddbmm(mask, rows, keys, beta=int(causal), alpha=scale).softmax(-1)
            out[:, :, start:stop] = (probabilities @ v[:, :seen]).view_as(out[:, :, start:stop])
            kept.append(probabilities)
        ctx.save_for_backward(q, k, v, *(kept if any(ctx.needs_input_grad) else ()))
        ctx.scale, ctx.causal = scale, causal
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """With dP = dO V^T: dS = P * (dP - rowsum(P * dP)), dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO."""
        q, k, v, *kept = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (start, stop, seen), probabilities in zip(_blocks(q, k, ctx.causal), kept, strict=True):
            rows, d_rows = (x[:, :, start:stop].flatten(1, 2) for x in (q, grads[0]))
            d_prob = d_rows @ v[:, :seen].transpose(1, 2)
            d_scores = torch._softmax_backward_data(d_prob, probabilities, -1, q.dtype)
            dq[:, :, start:stop] = (d_scores @ k[:, :seen]).view_as(dq[:, :, start:stop])
            dk[:, :seen] += d_scores.transpose(1, 2) @ rows
            dv[:, :seen] += probabilities.transpose(1, 2) @ d_rows
        return dq.mul_(ctx.scale), dk.mul_(ctx.scale), dv, None, None


def _blocks(q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[int, int, int]]:
    """First query, end of the queries, and end of the keys that they see, a block."""
    for start in range(0, q.shape[2], BLOCK):
        stop = min(start + BLOCK, q.shape[2])
        yield start, stop, stop if causal else k.shape[1]


def _causal_mask(q: Tensor, start: int, stop: int) -> Tensor:
    """0 where a query of the block may look, else -inf: [G * b, stop], once for each query head of a key head."""
    mask = torch.full((stop - start, stop), float("-inf"), dtype=q.dtype, device=q.device).triu_(start + 1)
    return mask.repeat(q.shape[1], 1)

"""Causal attention over a packed row (``numerics.packing``): documents stand one after the other and none sees another.

Shapes: ``T`` tokens of the row, ``H`` query heads, ``K`` key-value heads, ``G = H / K`` queries a key head, ``D`` head
dim, ``P`` shared tokens; for ``n`` documents of like length ``L`` own tokens of the longest, ``S >= P + L`` keys, ``b``
queries of each at once.

    O = softmax(scale * Q K^T + mask) V        for each document by itself

Two kernels. PyTorch's fused one wherever it is the fast one; on a CPU in bfloat16 ``_PackedAttention``: documents of
like length side by side, plain matmuls that keep the probabilities for the backward pass. Neither repeats keys for the
query heads that share them where it need not, and no mask of [T, T] is ever built.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lorakit.numerics.attention import causal_attention, matmuls_are_faster
from lorakit.numerics.packing import Laid, Packing

BLOCK = 128
"""Queries of a document at once in ``_PackedAttention``: keys beyond a block's last one are not touched."""

LONGEST_KEPT = 2048
"""Most keys of a query for probabilities to be kept (H * L * S / 2 numbers a layer); beyond, the fused kernel."""


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float, window: int | None = None
) -> Tensor:
    """Causal attention within each document and the tokens that it shares.

    Args:
        q: [T, H, D].
        k, v: [T, K, D], H a multiple of K; head ``h`` of q attends to head ``h // (H / K)``.
        packing: where the documents are.
        scale: factor of the scores, 1 / sqrt(D) as a rule.
        window: a token sees itself and so many less one before it (Mistral's sliding window); None: all before it.

    Returns:
        [T, H, D] in q's dtype.

    Raises:
        ValueError: the packing is not of T tokens, or H is not a multiple of K.
    """
    tokens, heads, _ = q.shape
    if packing.tokens != tokens:
        raise ValueError(f"a packing of {packing.tokens} tokens does not fit a row of {tokens}")
    if heads % k.shape[1]:
        raise ValueError(f"{heads} query heads cannot share {k.shape[1]} key heads")
    if window is not None and packing.shared + max(packing.lengths) > window:
        return _windowed(q, k, v, packing, scale, window)
    if matmuls_are_faster(q) and max(packing.lengths) + packing.shared <= LONGEST_KEPT:
        return matmul_packed_attention(q, k, v, packing, scale)
    return _fused(q, k, v, packing, scale)


def _windowed(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float, window: int) -> Tensor:
    """A window's queries of a document at a time, with the keys that any of them sees."""
    begin, out, place = slice(0, packing.shared), [], 0
    for shared, length in [(0, packing.shared)] * (packing.shared > 0) + [(packing.shared, n) for n in packing.lengths]:
        own = slice(place, place + length)
        keys, values = (torch.cat([x[begin], x[own]]) if shared else x[own] for x in (k, v))
        for first in range(0, length, window):
            last = min(first + window, length)
            seen = slice(max(0, shared + first - window + 1), shared + last)
            distance = torch.arange(shared + first, shared + last)[:, None] - torch.arange(seen.start, seen.stop)
            query, key, value = (
                x.transpose(0, 1)[None] for x in (q[place + first : place + last], keys[seen], values[seen])
            )
            mask = ((distance >= 0) & (distance < window)).to(q.device)
            mixed = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            out.append(mixed[0].transpose(0, 1))
        place += length
    return torch.cat(out)


def matmul_packed_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float) -> Tensor:
    """``packed_attention`` by plain matmuls."""
    out: Tensor = _PackedAttention.apply(q, k, v, packing.laid(k.shape[1], BLOCK), scale)
    return out


def _fused(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float) -> Tensor:
    """PyTorch's kernel, a group at a time. It takes square causal masks only, so that zeros stand where the shared
    tokens' queries would."""
    laid, outs = packing.laid(1), []
    rows, keys, values = _LaidOut.apply(q, k, v, laid)
    for group, places in zip(packing.groups, laid.groups, strict=True):
        (block,) = places.blocks
        chosen = rows[block.queries], keys[places.keys], values[places.keys]
        own, *others = (x.unflatten(0, (group.count, -1)) for x in chosen)
        query = functional.pad(own, (0, 0, 0, 0, group.shared, 0)).transpose(1, 2)
        key, value = (x[:, : group.shared + group.longest].transpose(1, 2) for x in others)
        out = causal_attention(query, key, value, scale)
        outs.append(out[:, :, group.shared :].transpose(1, 2).flatten(0, 1))
    together: Tensor = _Together.apply(torch.cat(outs), laid)
    return together


class _LaidOut(torch.autograd.Function):
    """The queries, keys and values as ``laid`` says. The backward pass takes what belongs to a token, since PyTorch's
    own would add up into whole rows, on a GPU by sorting, to sum in one order."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, laid: Laid) -> tuple[Tensor, ...]:
        ctx.laid = laid
        return q.index_select(0, laid.queries), k.index_select(0, laid.keys), v.index_select(0, laid.keys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        d_rows, d_keys, d_values = grads
        own = d_rows.index_select(0, ctx.laid.own_queries)
        return own, _of_tokens(d_keys, ctx.laid), _of_tokens(d_values, ctx.laid), None


class _Together(torch.autograd.Function):
    """Laid-out outputs as one row [T, H, D]."""

    @staticmethod
    def forward(ctx: Any, outs: Tensor, laid: Laid) -> Tensor:
        ctx.laid = laid
        return outs.index_select(0, laid.own_queries)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _asked_once(grads[0], ctx.laid), None


def _asked_once(grad: Tensor, laid: Laid) -> Tensor:
    """Rows' gradients laid out as queries, 0 for repeats."""
    pull = grad.index_select(0, laid.queries)
    return pull if laid.once is None else pull.mul_(laid.once.view(-1, *[1] * (grad.dim() - 1)))


def _of_tokens(grad: Tensor, laid: Laid) -> Tensor:
    """The rows' gradients of what the laid-out keys' are: those of the shared tokens summed over the documents, in
    float32 at least."""
    total = grad.index_select(0, laid.own_keys)
    if laid.shared_keys is not None:
        documents, shared = laid.shared_keys.shape
        parts = grad.index_select(0, laid.shared_keys.flatten()).unflatten(0, (documents, shared))
        total[:shared] += parts.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype)
    return total


class _PackedAttention(torch.autograd.Function):
    """Query heads of a key head are folded into rows: [n * K, b * G, D] x [n * K, D, keys] for ``b`` queries."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, laid: Laid, scale: float) -> Tensor:
        share, width = q.shape[1] // k.shape[1], q.shape[2]
        rows = q.reshape(-1, share * width).index_select(0, laid.queries)
        keys, values = (x.reshape(-1, width).index_select(0, laid.keys) for x in (k, v))
        mixed, kept = torch.empty_like(rows), []
        for group in laid.groups:
            key, value = (x[group.keys].view(group.matrices, -1, width) for x in (keys, values))
            for block in group.blocks:
                query, out = (x[block.queries].view(group.matrices, -1, width) for x in (rows, mixed))
                mask, seen = laid.mask(block, share, query), key[:, : block.seen].transpose(1, 2)
                scores = torch.baddbmm(mask, query, seen, alpha=scale)
                kept.append(torch.softmax(scores, -1, out=scores))
                torch.bmm(scores, value[:, : block.seen], out=out)
        ctx.save_for_backward(rows, keys, values, *(kept if any(ctx.needs_input_grad) else ()))
        ctx.laid, ctx.scale, ctx.shapes = laid, scale, (q.shape, k.shape)
        return mixed.index_select(0, laid.own_queries).view(q.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """With dP = dO V^T: dS = P * (dP - rowsum(P * dP)), dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO."""
        rows, keys, values, *kept = ctx.saved_tensors
        laid, (asked, held) = ctx.laid, ctx.shapes
        pull = _asked_once(grads[0].reshape(-1, rows.shape[1]), laid)
        d_rows, d_keys, d_values = (torch.empty_like(x) for x in (rows, keys, values))
        for group in reversed(laid.groups):
            views = (x[group.keys].view(group.matrices, -1, asked[2]) for x in (keys, values, d_keys, d_values))
            key, value, d_key, d_value = views
            for block in reversed(group.blocks):
                query, d_query, d_out = (
                    x[block.queries].view(group.matrices, -1, asked[2]) for x in (rows, d_rows, pull)
                )
                seen, p, begun = slice(block.seen), kept.pop(), int(block is not group.blocks[-1])
                d_prob = torch.bmm(d_out, value[:, seen].transpose(1, 2))
                d_scores = torch._softmax_backward_data(d_prob, p, -1, p.dtype)
                torch.bmm(d_scores, key[:, seen], out=d_query)
                d_key[:, seen].baddbmm_(d_scores.transpose(1, 2), query, beta=begun)
                d_value[:, seen].baddbmm_(p.transpose(1, 2), d_out, beta=begun)
        dq = d_rows.index_select(0, laid.own_queries).view(asked)
        dk, dv = (_of_tokens(x, laid).view(held) for x in (d_keys, d_values))
        return dq.mul_(ctx.scale), dk.mul_(ctx.scale), dv, None, None

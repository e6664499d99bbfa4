"""Causal attention over a packed row: documents stand one after the other and none sees another.

    row = [tokens that begin every document, once] [document 1] [document 2] ...

Documents that begin alike (a system prompt, a template's marks) share those tokens: causal attention gives them the
same states in each document, so they are computed once and every document attends to them.

Shapes: ``T`` tokens of the row, ``H`` query heads, ``K`` key-value heads, ``G = H / K`` queries a key head, ``D`` head
dim, ``P`` shared tokens; for ``n`` documents of like length: ``L`` own tokens of the longest, ``S >= P + L`` keys.

    O = softmax(scale * Q K^T + mask) V        for each document by itself

Two kernels. PyTorch's fused one wherever it is the fast one; on a CPU in bfloat16 ``_PackedAttention``: documents of
like length side by side, plain matmuls that keep the probabilities for the backward pass. Neither repeats keys for the
query heads that share them where it need not, and no mask of [T, T] is ever built.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lorakit.numerics.attention import causal_attention, matmuls_are_faster

BLOCK = 128
"""Queries of a document at once in ``_PackedAttention``: keys beyond a block's last one are not touched."""

LONGEST_KEPT = 2048
"""Most keys of a query for probabilities to be kept (H * L * S / 2 numbers a layer); beyond, the fused kernel."""

PADDING = 1.15
"""A group of documents, each padded to its longest, has at most so many times their own tokens."""

ALIGNED = 32
"""Keys are padded to a multiple of this: softmax over a row of another length is up to three times as slow."""


@dataclass(frozen=True)
class Group:
    """``n`` documents of like length that are attended to together, one after the other in the row."""

    start: int
    stop: int
    """Their own tokens in the row."""
    shared: int
    """P, or 0 for the shared tokens themselves."""
    count: int
    """n"""
    longest: int
    """L"""
    width: int
    """S"""
    queries: Tensor
    """int64 [n * L]: places in the row; a shorter document repeats its last one."""
    keys: Tensor
    """int64 [n * S], likewise: the shared tokens, then the own ones."""
    real: Tensor
    """int64 [stop - start]: which of ``queries`` are not repeats."""
    real_keys: Tensor
    """int64 [stop - start]: which of ``keys`` are the own tokens."""
    once: Tensor
    """bool [n * L, 1, 1]: False where ``queries`` repeats a document's last."""

    @classmethod
    def of(cls, start: int, lengths: Sequence[int], shared: int, device: torch.device) -> "Group":
        longest = max(lengths)
        width = _aligned(shared + longest)
        queries, keys, real, own, place = [], [], [], [], start
        begin = torch.arange(shared)
        for number, length in enumerate(lengths):
            steps = torch.arange(max(longest, width - shared)).clamp_max(length - 1) + place
            queries.append(steps[:longest])
            keys.append(torch.cat([begin, steps[: width - shared]]))
            real.append(torch.arange(length) + number * longest)
            own.append(torch.arange(length) + number * width + shared)
            place += length
        once = torch.cat([torch.arange(longest) < length for length in lengths])[:, None, None]
        parts = *(torch.cat(part) for part in (queries, keys, real, own)), once
        placed = (part.to(device, non_blocking=True) for part in parts)
        return cls(start, place, shared, len(lengths), longest, width, *placed)

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """First query, end of the queries, and end of the keys that they see, a block."""
        for first in range(0, self.longest, BLOCK):
            last = min(first + BLOCK, self.longest)
            yield first, last, _aligned(self.shared + last)


@dataclass(frozen=True)
class Packing:
    """Where the documents of a row are; made once a row, used in every layer."""

    shared: int
    """Tokens at the row's start that stand before each document."""
    lengths: tuple[int, ...]
    """Own tokens of each document, in order; with ``shared`` they sum to the row."""
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, lengths: Sequence[int], shared: int = 0, device: torch.device | str = "cpu") -> "Packing":
        """Raises ValueError when a document has no token of its own."""
        if not lengths or min(lengths) < 1 or shared < 0:
            raise ValueError(f"no packing of {shared} shared tokens and documents of {list(lengths)}")
        device = torch.device(device)
        groups = [Group.of(0, [shared], 0, device)] if shared else []
        place, waiting = shared, list(lengths)
        while waiting:
            count = _alike(waiting)
            groups.append(Group.of(place, waiting[:count], shared, device))
            place, waiting = groups[-1].stop, waiting[count:]
        return cls(shared, tuple(lengths), tuple(groups))

    @property
    def tokens(self) -> int:
        """T"""
        return self.shared + sum(self.lengths)


def _aligned(keys: int) -> int:
    return -(-keys // ALIGNED) * ALIGNED


def _alike(lengths: Sequence[int]) -> int:
    """How many of the first documents make a group."""
    longest = total = 0
    for count, length in enumerate(lengths):
        longest, total = max(longest, length), total + length
        if longest * (count + 1) > PADDING * total:
            return count
    return len(lengths)


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
    out: Tensor = _PackedAttention.apply(q, k, v, packing, scale)
    return out


def _fused(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float) -> Tensor:
    """PyTorch's kernel, a group at a time. It takes square causal masks only, so that zeros stand where the shared
    tokens' queries would."""
    outs, laid_out = [], iter(_LaidOut.apply(q, k, v, packing))
    for group, rows, keys, values in zip(packing.groups, laid_out, laid_out, laid_out, strict=True):
        begin = group.shared
        rows, keys, values = (x.unflatten(0, (group.count, -1)) for x in (rows, keys, values))
        rows = functional.pad(rows, (0, 0, 0, 0, begin, 0)).transpose(1, 2)
        keys, values = (x[:, : begin + group.longest].transpose(1, 2) for x in (keys, values))
        out = causal_attention(rows, keys, values, scale)
        outs.append(out[:, :, begin:].transpose(1, 2).flatten(0, 1))
    together: Tensor = _Together.apply(packing, *outs)
    return together


class _LaidOut(torch.autograd.Function):
    """Of each group its queries [n * L, H, D], its keys and values [n * S, K, D]. The backward pass takes what belongs
    to a token, since PyTorch's own would add up into whole rows, on a GPU by sorting, to sum in one order."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> tuple[Tensor, ...]:
        ctx.packing, ctx.shapes = packing, (q.shape, k.shape, v.shape)
        return tuple(
            x.index_select(0, places)
            for group in packing.groups
            for x, places in ((q, group.queries), (k, group.keys), (v, group.keys))
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        dq, dk, dv = (grads[0].new_empty(shape) for shape in ctx.shapes)
        shared, parts = _Shared(ctx.packing, dk), iter(grads)
        for group, d_rows, d_keys, d_values in zip(ctx.packing.groups, parts, parts, parts, strict=True):
            dq[group.start : group.stop] = d_rows.index_select(0, group.real)
            shared.add(group, (dk, dv), (d_keys, d_values))
        shared.put((dk, dv))
        return dq, dk, dv, None


class _Together(torch.autograd.Function):
    """The groups' outputs [n * L, H, D] as one row [T, H, D]."""

    @staticmethod
    def forward(ctx: Any, packing: Packing, *outs: Tensor) -> Tensor:
        ctx.packing = packing
        return torch.cat([out.index_select(0, group.real) for group, out in zip(packing.groups, outs, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return None, *(grad.index_select(0, group.queries) * group.once for group in ctx.packing.groups)


class _Shared:
    """The gradients of keys and values, those of the shared tokens summed over the documents in float32 at least."""

    def __init__(self, packing: Packing, keys: Tensor) -> None:
        dtype = torch.promote_types(keys.dtype, torch.float32)
        self._sums = torch.zeros((2, packing.shared, *keys.shape[1:]), dtype=dtype, device=keys.device)

    def add(self, group: Group, totals: tuple[Tensor, Tensor], parts: tuple[Tensor, Tensor]) -> None:
        """A group's ``parts`` [n * S, K, D]: what is its own into ``totals`` [T, K, D], the rest to the sums."""
        for total, part, sums in zip(totals, parts, self._sums, strict=True):
            total[group.start : group.stop] = part.index_select(0, group.real_keys)
            begun = part.unflatten(0, (group.count, -1))[:, : group.shared]
            sums[: group.shared] += begun.sum(0, dtype=sums.dtype)

    def put(self, totals: tuple[Tensor, Tensor]) -> None:
        """The sums into their places in ``totals``."""
        for total, sums in zip(totals, self._sums, strict=True):
            total[: len(sums)] += sums.to(total.dtype)


class _PackedAttention(torch.autograd.Function):
    """Query heads of a key head are folded into rows: [n * K, b * G, D] x [n * K, D, keys] for ``b`` queries."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float) -> Tensor:
        kept: list[Tensor] = []
        share, out = q.shape[1] // k.shape[1], torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for group in packing.groups:
            rows, keys, values = _operands(q, k, v, group)
            mixed = torch.empty_like(rows)
            for first, last, seen in group.blocks():
                block, none = slice(first * share, last * share), rows.new_zeros(())
                scores = torch.baddbmm(none, rows[:, block], keys[:, :seen].transpose(1, 2), beta=0, alpha=scale)
                _hide(scores, last - first, group.shared + first)
                kept.append(scores.softmax(-1))
                mixed[:, block] = kept[-1] @ values[:, :seen]
            out[group.start : group.stop] = _unfold(mixed, group.count, share).index_select(0, group.real)
        ctx.save_for_backward(q, k, v, *(kept if any(ctx.needs_input_grad) else ()))
        ctx.packing, ctx.scale = packing, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """With dP = dO V^T: dS = P * (dP - rowsum(P * dP)), dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO."""
        q, k, v, *kept = ctx.saved_tensors
        share, probabilities = q.shape[1] // k.shape[1], iter(kept)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        shared = _Shared(ctx.packing, dk)
        for group in ctx.packing.groups:
            rows, keys, values = _operands(q, k, v, group)
            pull = grads[0].new_zeros((len(group.queries), *q.shape[1:]))
            pull.index_copy_(0, group.real, grads[0][group.start : group.stop])
            pull = _fold(pull, group.count, k.shape[1])
            d_rows, d_keys, d_values = torch.empty_like(rows), torch.zeros_like(keys), torch.zeros_like(values)
            for first, last, seen in group.blocks():
                block, p = slice(first * share, last * share), next(probabilities)
                d_prob = pull[:, block] @ values[:, :seen].transpose(1, 2)
                d_scores = torch._softmax_backward_data(d_prob, p, -1, q.dtype)
                d_rows[:, block] = d_scores @ keys[:, :seen]
                d_keys[:, :seen] += d_scores.transpose(1, 2) @ rows[:, block]
                d_values[:, :seen] += p.transpose(1, 2) @ pull[:, block]
            dq[group.start : group.stop] = _unfold(d_rows, group.count, share).index_select(0, group.real)
            shared.add(group, (dk, dv), (_unfold(d_keys, group.count, 1), _unfold(d_values, group.count, 1)))
        shared.put((dk, dv))
        return dq.mul_(ctx.scale), dk.mul_(ctx.scale), dv, None, None


def _operands(q: Tensor, k: Tensor, v: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """A group's queries [n * K, L * G, D], and its keys and values [n * K, S, D]."""
    chosen = (q.index_select(0, group.queries), k.index_select(0, group.keys), v.index_select(0, group.keys))
    rows, keys, values = (_fold(x, group.count, k.shape[1]) for x in chosen)
    return rows, keys, values


def _fold(x: Tensor, documents: int, key_heads: int) -> Tensor:
    """[n * L, K * G, D] -> [n * K, L * G, D]"""
    split = x.reshape(documents, -1, key_heads, x.shape[1] // key_heads, x.shape[2])
    return split.transpose(1, 2).reshape(documents * key_heads, -1, x.shape[2])


def _unfold(x: Tensor, documents: int, share: int) -> Tensor:
    """[n * K, L * G, D] -> [n * L, K * G, D]"""
    key_heads = x.shape[0] // documents
    split = x.reshape(documents, key_heads, -1, share, x.shape[2])
    return split.transpose(1, 2).reshape(-1, key_heads * share, x.shape[2])


def _hide(scores: Tensor, queries: int, first: int) -> None:
    """-inf, in place, where a block's queries may not look: its query ``i`` sees the keys up to ``first + i``."""
    late = scores.view(len(scores), queries, -1, scores.shape[-1])[..., first:]
    shape, ninf = (queries, late.shape[-1]), float("-inf")
    late += torch.full(shape, ninf, dtype=scores.dtype, device=scores.device).triu_(1).unsqueeze(1)

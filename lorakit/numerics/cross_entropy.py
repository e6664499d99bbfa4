"""Cross-entropy of a linear head without keeping its logits.

Shapes: ``N`` labelled rows, ``D`` width, ``V`` vocabulary.

    loss = sum_n logsumexp(W h_n) - (W h_n)[y_n]        d loss / d h_n = W^T (softmax(W h_n) - onehot(y_n))

The head W is frozen under LoRA, so the gradient of h is all the backward pass needs. It is computed in the forward
pass, chunk by chunk, while the logits are at hand: N x V numbers are never kept.
"""

import math
from typing import Any

import torch
from torch import Tensor

CHUNK_NUMBERS = 1 << 24
"""Logits at once at most: 64 MiB in float32. Few rows are slow: the whole head is read for each chunk."""

EXACT_NUMBERS = 1 << 21
"""On a CPU as many of them are made probabilities at once, in float32: 8 MiB, which its cache holds from pass to pass.
On a GPU all are, since each pass costs it a start."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of the cross-entropy of ``hidden @ weight.T`` with ``targets``.

    Args:
        hidden: [N, D], the labelled rows only; N may be 0.
        weight: [V, D], frozen.
        targets: int64 [N].

    Returns:
        A float32 scalar (float64 for float64 inputs), the SUM over rows.

    Raises:
        ValueError: the weight asks for a gradient.
    """
    if weight.requires_grad:
        raise ValueError("linear_cross_entropy gives no gradient to the head; freeze it")
    return _LinearCrossEntropy.apply(hidden, weight, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        most = max(1, CHUNK_NUMBERS // len(weight))
        chunk = max(1, math.ceil(len(hidden) / max(1, math.ceil(len(hidden) / most))))
        # The same memory for all chunks: on a CPU new memory of this size costs as much as what is computed in it.
        logits = torch.empty(chunk, len(weight), dtype=hidden.dtype, device=hidden.device)
        few = max(1, EXACT_NUMBERS // len(weight)) if hidden.device.type == "cpu" else chunk
        exact = torch.empty(few, len(weight), dtype=wide, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            rows, labels = hidden[start : start + chunk], targets[start : start + chunk, None]
            scores = torch.mm(rows, weight.T, out=logits[: len(rows)])
            for some, right in zip(scores.split(len(exact)), labels.split(len(exact)), strict=True):
                p = some if some.dtype == wide else exact[: len(some)].copy_(some)
                torch.log_softmax(p, -1, out=p)
                loss -= p.gather(1, right).sum()
                if gradient is not None:
                    some.copy_(_less_one(p.exp_(), right))
            if gradient is not None:
                torch.mm(scores, weight, out=gradient[start : start + chunk])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        if gradient.dtype == torch.float16:  # a loss scale may be larger than its largest number
            return (gradient.float() * grads[0]).to(gradient.dtype), None, None
        return gradient * grads[0].to(gradient.dtype), None, None


def _less_one(p: Tensor, places: Tensor) -> Tensor:
    """p [n, V], in place, with 1 taken from each row at its place [n, 1]. CUDA's scatter_add_ would sort the places."""
    if p.device.type == "cpu":
        return p.scatter_add_(1, places, torch.full_like(places, -1, dtype=p.dtype))
    return p.sub_(places == torch.arange(p.shape[1], device=p.device))

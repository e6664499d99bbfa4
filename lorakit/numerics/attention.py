"""Attention without a mask, and which kernel is the fast one.

Shapes: ``T`` queries, ``S`` tokens attended to, ``D`` head dim.

    O = softmax(scale * Q K^T) V

Two kernels: PyTorch's fused one wherever it is the fast one, and ``numerics.blocked_attention`` on a CPU in bfloat16
where a gradient is taken: forward and backward together, the fused kernel is slower than plain matmuls there.
``numerics.packed_attention`` has packed documents under a causal mask.
"""

import torch
from torch import Tensor
from torch.nn import functional

from lorakit.numerics.blocked_attention import blocked_attention


def full_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention without a mask: q [..., T, D], k and v [..., S, D] of the same leading dimensions -> [..., T, D]."""
    if not (torch.is_grad_enabled() and matmuls_are_faster(q)):
        return functional.scaled_dot_product_attention(q, k, v, scale=scale)
    rows, keys, values = (x.flatten(0, -3) for x in (q, k, v))
    return blocked_attention(rows, keys, values, scale).view_as(q)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """PyTorch's fused kernel, each query seeing the keys up to its own place: q [N, H, T, D], k and v [N, K, T, D] with
    H a multiple of K -> [N, H, T, D]. Inputs of three dimensions would have it keep all scores [T, T]."""
    if not shares_keys(q):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    shared = k.shape[1] < q.shape[1]
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=shared)


def matmuls_are_faster(q: Tensor) -> bool:
    """Whether plain matmuls beat PyTorch's fused kernel: on a CPU in bfloat16."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16


def shares_keys(q: Tensor) -> bool:
    """Whether PyTorch's fused kernels take fewer key heads than query heads: on a GPU flash attention alone does, which
    is for 16 bits, from Ampere on."""
    if q.device.type != "cuda":
        return q.device.type == "cpu"
    return q.dtype in (torch.float16, torch.bfloat16) and torch.cuda.get_device_capability(q.device) >= (8, 0)

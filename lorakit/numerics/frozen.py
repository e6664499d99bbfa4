"""Layers of a UNet that are not trained: their input's gradient alone, little kept, and on a CPU no slow detours.

Shapes: ``B`` pictures, ``C`` channels in, ``O`` out, ``P`` places (height x width) out, ``T`` rows of features, ``F``
features in, ``n`` features of a gate. No weight gets a gradient: each function raises ValueError where one asks for it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_input

FEW_PLACES, MANY_WEIGHTS = 256, 1 << 22
"""Up to so many places B * P, and from so many weights O * C * kh * kw on, a convolution is bound by its weights, which
oneDNN reorders at every call: there one matmul that takes them as they are is faster, elsewhere the convolution is."""

MANY_PLACES = 1024
"""From so many places P on, a matmul a picture is faster than a 1x1 convolution."""


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """A convolution without groups or dilation: x [B, C, h, w], weight [O, C, kh, kw] -> [B, O, h', w']."""
    _check_frozen(weight, bias)
    if not (torch.is_grad_enabled() or _is_fast_place(x)):
        return functional.conv2d(x, weight, bias, stride, padding)
    out: Tensor = _Convolution.apply(x, weight, bias, stride, padding)
    return out


class _Convolution(torch.autograd.Function):
    """Keeps its weight alone; PyTorch's own keeps its input too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        sides = [(n + 2 * padding - k) // stride + 1 for n, k in zip(x.shape[2:], weight.shape[2:], strict=True)]
        places = sides[0] * sides[1]
        pointwise = weight.shape[2:] == (1, 1) and stride == 1 and padding == 0
        ctx.pointwise = _is_fast_place(x) and pointwise and places >= MANY_PLACES
        ctx.few = _is_fast_place(x) and len(x) * places <= FEW_PLACES and weight.numel() >= MANY_WEIGHTS
        ctx.save_for_backward(weight)
        ctx.size, ctx.window = x.shape, {"padding": padding, "stride": stride}
        if ctx.pointwise:
            out = _each(weight.flatten(1), x.flatten(2))
        elif ctx.few:  # one matmul over all pictures reads the weight once
            columns = functional.unfold(x, weight.shape[2:], **ctx.window).transpose(0, 1).flatten(1)
            out = (weight.flatten(1) @ columns).unflatten(1, (len(x), -1)).transpose(0, 1)
        else:
            return functional.conv2d(x, weight, bias, stride, padding)
        out = out if bias is None else out + bias[:, None]
        return out.reshape(len(x), -1, *sides)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (weight,) = ctx.saved_tensors
        g = grads[0].flatten(2)
        if ctx.pointwise:
            dx = _each(weight.flatten(1).T, g).view(ctx.size)
        elif ctx.few:
            columns = weight.flatten(1).T @ g.transpose(0, 1).flatten(1)
            columns = columns.unflatten(1, (len(g), -1)).transpose(0, 1)
            dx = functional.fold(columns, ctx.size[2:], weight.shape[2:], **ctx.window)
        else:
            dx = conv2d_input(ctx.size, weight, grads[0], **ctx.window)
        return dx, None, None, None, None


def _each(rows: Tensor, pictures: Tensor) -> Tensor:
    """[O, C] times each [C, P] of [B, C, P], without the copies that ``rows @ pictures`` makes of both."""
    out = pictures.new_empty(len(pictures), len(rows), pictures.shape[2])
    for picture, product in zip(pictures, out, strict=True):
        torch.mm(rows, picture, out=product)
    return out


def _check_frozen(*weights: Tensor | None) -> None:
    if any(weight is not None and weight.requires_grad for weight in weights):
        raise ValueError("a frozen layer gives no gradient to its weights")


def _is_fast_place(x: Tensor) -> bool:
    """Where the shapes of this file were measured: a CPU in bfloat16."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(x V^T + c) * gelu(x W^T + d), x [..., F], [V; W] = weight [2n, F], [c; d] = bias [2n] -> [..., n].

    Shazeer 2020, arXiv:2002.05202. Both halves are products of their own: what follows then reads whole rows, and the
    backward pass has no halves to put together.
    """
    _check_frozen(weight, bias)
    out: Tensor = _Geglu.apply(x, weight, bias)
    return out


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        (up, down), (first, second) = weight.chunk(2), bias.chunk(2)
        value, gate = functional.linear(rows, up, first), functional.linear(rows, down, second)
        ctx.save_for_backward(value, gate, weight)
        return (functional.gelu(gate).mul_(value)).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        value, gate, weight = ctx.saved_tensors
        up, down = weight.chunk(2)
        g = grads[0].reshape(value.shape)
        dx = (functional.gelu(gate).mul_(g)) @ up
        dx.addmm_(torch.ops.aten.gelu_backward(value * g, gate), down)
        return dx.view(*grads[0].shape[:-1], -1), None, None


def norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """silu(groupnorm(x)), x [B, C, ...]; the normed tensor is made again in the backward pass instead of being kept."""
    _check_frozen(weight, bias)
    if not torch.is_grad_enabled():
        return functional.silu(functional.group_norm(x, groups, weight, bias, eps), inplace=True)
    out: Tensor = _NormSilu.apply(x, groups, weight, bias, eps)
    return out


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        shape = x.shape[0], x.shape[1], x[0, 0].numel(), groups
        normed, mean, deviation = torch.native_group_norm(x, weight, bias, *shape, eps)
        ctx.save_for_backward(x, mean, deviation, weight, bias)
        ctx.shape, ctx.eps = shape, eps
        return functional.silu(normed, inplace=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, mean, deviation, weight, bias = ctx.saved_tensors
        shape: tuple[int, int, int, int] = ctx.shape
        normed, _, _ = torch.native_group_norm(x, weight, bias, *shape, ctx.eps)
        d_normed = torch.ops.aten.silu_backward(grads[0], normed)
        needed = (True, False, False)
        dx, _, _ = torch.ops.aten.native_group_norm_backward(
            d_normed.contiguous(), x, mean, deviation, weight, *shape, needed
        )
        return dx, None, None, None, None

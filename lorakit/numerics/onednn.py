"""Layers for inference over weights in oneDNN's blocked layout: reordered once, where a plain layer does it every call.

Shapes: ``B`` pictures, ``C`` channels in, ``O`` channels or features out, ``I`` features in, ``h`` and ``w`` sides.
Where there is no such layout, the same layers are computed plainly.
"""

import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Layer = Callable[[Tensor], Tensor]

ROWS = 16
"""Rows at once that a linear layer's layout is chosen for; any number is computed right."""


def packable(weight: Tensor) -> bool:
    """Whether this machine has a blocked layout for ``weight``."""
    if weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    onednn: Any = torch.backends.mkldnn
    if not (onednn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def linear(weight: Tensor, bias: Tensor | None = None) -> Layer:
    """x [..., I] -> x W^T + b [..., O], weight [O, I]. Of a small x torch's own takes twice the time for the weight."""
    if not packable(weight):
        return lambda x: functional.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class Convolution:
    """x [B, C, h, w] -> [B, O, h', w'], weight [O, C, kh, kw], without groups or dilation.

    In bfloat16 the result is channels_last, whatever x is. In float32 the plain convolution is as fast, and what
    follows is faster on plain rows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> None:
        self._weight, self._bias = weight, bias
        self._window = [padding] * 2, [stride] * 2, [1, 1], 1
        self._blocked = weight.dtype == torch.bfloat16 and packable(weight)
        self._size: torch.Size | None = None
        self._packed = weight

    def __call__(self, x: Tensor) -> Tensor:
        if not self._blocked:
            padding, stride, _, _ = self._window
            return functional.conv2d(x, self._weight, self._bias, stride, padding)
        if x.shape != self._size:  # a layout for another size would be put right at every call, at fifty times the time
            self._packed = _reorder(self._weight.to_mkldnn(), *self._window, list(x.shape))
            self._size = x.shape
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self._packed, self._bias, *self._window, "none", [], ""
        )
        return out


_reorder: Any = torch.ops.aten.mkldnn_reorder_conv2d_weight

"""Linear layers that read the same input, with their LoRA, as one matmul for inference.

Shapes: ``I`` features in, ``O`` features out of all layers together, ``r`` ranks of all adapters together.

    [z u] = x [W; A]^T                 the base's rows, then every A's, in the base's dtype
    y = z + u B^T + b                  B [O, r] is block-diagonal, each scale multiplied in

A token at a time, the time goes into reading weights and starting kernels: here each weight is read once, in oneDNN's
blocked layout where that helps, and a layer takes two matmuls whatever its adapters.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.peft_lora import Linear as PeftLinear
from lorakit.numerics.onednn import linear


def stackable(layer: nn.Module) -> bool:
    """Whether ``Stacked`` computes this layer: nn.Linear, bare or under LoRA without DoRA and other variants."""
    if not isinstance(layer, PeftLinear):
        return type(layer) is nn.Linear
    return (
        type(layer.get_base_layer()) is nn.Linear
        and not (layer.merged or layer.disable_adapters or layer.fan_in_fan_out)
        and not (layer.lora_variant or any(layer.lora_bias.values()))
    )


class Stacked:
    """The outputs of ``layers`` side by side: x [n, I] -> [n, O]. Weights are copied, but for a single one.

    Raises ValueError for a layer that is not ``stackable``.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        if not all(map(stackable, layers)):
            raise ValueError("only nn.Linear and plain LoRA over it can be stacked")
        bases: list[Any] = [layer.get_base_layer() if isinstance(layer, PeftLinear) else layer for layer in layers]
        weights: list[Tensor] = [base.weight for base in bases]
        self.out = sum(weight.shape[0] for weight in weights)
        with torch.no_grad():
            downs, self._up = _low_rank(layers, weights)
            self._multiply = linear(torch.cat([*weights, *downs]) if len(weights) + len(downs) > 1 else weights[0])
            self._bias = _biases(bases) if any(base.bias is not None for base in bases) else None

    def __call__(self, x: Tensor) -> Tensor:
        both = self._multiply(x)
        y = both[:, : self.out]
        if self._up is not None and self._up.dtype == both.dtype:
            y.addmm_(both[:, self.out :], self._up)
        elif self._up is not None:
            y += both[:, self.out :].to(self._up.dtype) @ self._up
        if self._bias is not None:
            y += self._bias
        return y


def _low_rank(layers: Sequence[nn.Module], weights: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | None]:
    """Every A in the base's dtype, and B^T [r, O] in float32 or wider; no A and None without adapters."""
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    downs, ups = [], []
    for layer, weight in zip(layers, weights, strict=True):
        lora: Any = layer
        names = [n for n in lora.active_adapters if n in lora.lora_A] if isinstance(layer, PeftLinear) else []
        parts = [(lora.lora_A[n].weight, lora.lora_B[n].weight, lora.scaling[n]) for n in names]
        downs += [a.to(weight.dtype) for a, _, _ in parts]
        none = weight.new_empty(len(weight), 0, dtype=dtype)
        ups.append(torch.cat([none, *(b.to(dtype) * scale for _, b, scale in parts)], 1))
    side_by_side: Any = torch.block_diag
    return downs, side_by_side(*ups).T.contiguous() if downs else None


def _biases(bases: Sequence[Any]) -> Tensor:
    return torch.cat([b.weight.new_zeros(len(b.weight)) if b.bias is None else b.bias.detach() for b in bases])

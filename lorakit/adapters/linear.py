"""PEFT's LoRA layer over a plain nn.Linear, with lorakit's own arithmetic.

PEFT's forward casts the input to float32, keeps that copy, and adds the adapter's result out of place; DoRA's rebuilds
the weight each time. ``LoraLinear`` computes the same function by ``numerics.lora``. What that function does not cover
(several adapters at once, a merged one) PEFT still computes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lorakit.adapters.peft_lora import Linear
from lorakit.numerics.lora import Magnitude, lora_linear, row_squares


class LoraLinear(Linear):
    """A ``peft.tuners.lora.Linear`` in all but its forward pass."""

    _squares: Tensor | None = None
    """DoRA: squared norms of the frozen weight's rows, float32 [O]."""

    _plain = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self._plain or self.disable_adapters or self.merged or len(names) != 1 or args or kwargs:
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        (name,) = names
        base: Any = self.get_base_layer()
        a: Any = self.lora_A[name]
        b: Any = self.lora_B[name]
        dropout = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
        return lora_linear(
            x,
            (base.weight, base.bias),
            (a.weight, b.weight),
            self.scaling[name],
            dropout,
            self._magnitude(name, base.weight),
        )

    def _magnitude(self, name: str, weight: Tensor) -> Magnitude | None:
        if name not in self.lora_magnitude_vector:
            return None
        vector: Any = self.lora_magnitude_vector[name]
        m: Tensor = vector.weight
        if self._squares is None:
            self._squares = row_squares(weight, m.dtype)
        return Magnitude(m, self._squares)


@contextmanager
def plain_layers(model: nn.Module) -> Iterator[None]:
    """PEFT's own forward pass in every layer, for as long as the block lasts."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for layer in layers:
        layer._plain = True
    try:
        yield
    finally:
        for layer in layers:
            layer._plain = False

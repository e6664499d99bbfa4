"""PEFT's LoRA layers over a linear layer, plain or quantized by bitsandbytes, with lorakit's own arithmetic.

PEFT's forward casts the input to float32, keeps that copy, and adds the adapter's result out of place; DoRA's rebuilds
the weight each time. These compute the same function by ``numerics.lora``. What that does not cover (several adapters
at once, a merged one, DoRA over quantized weights) PEFT still computes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from lorakit.adapters.peft_lora import Linear, Linear4bit, Linear8bitLt
from lorakit.numerics.joint import Layer, joint_linear
from lorakit.numerics.lora import Magnitude, lora_added, lora_linear, row_squares


class _Own:
    """What all of them need of PEFT's layer, which they stand in front of."""

    plain = False
    """Whether PEFT computes."""

    def only(self, given: tuple[object, ...]) -> str | None:
        """The one adapter's name; None where PEFT computes."""
        layer: Any = self
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        alone = len(names) == 1 and not (self.plain or layer.disable_adapters or layer.merged or any(given))
        return names[0] if alone else None

    def adapter(self, name: str) -> tuple[tuple[Tensor, Tensor], float, float]:
        """A and B, the scale, and the share that is dropped."""
        layer: Any = self
        dropout = getattr(layer.lora_dropout[name], "p", 0.0) if layer.training else 0.0
        return (layer.lora_A[name].weight, layer.lora_B[name].weight), layer.scaling[name], dropout


class LoraLinear(_Own, Linear):
    """A ``peft.tuners.lora.Linear`` in all but its forward pass."""

    _squares: Tensor | None = None
    """DoRA: squared norms of the frozen weight's rows, float32 [O]."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self.only((args, kwargs))
        if name is None:
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        base: Any = self.get_base_layer()
        return lora_linear(x, (base.weight, base.bias), *self.adapter(name), self._magnitude(name, base.weight))

    def _magnitude(self, name: str, weight: Tensor) -> Magnitude | None:
        if name not in self.lora_magnitude_vector:
            return None
        vector: Any = self.lora_magnitude_vector[name]
        m: Tensor = vector.weight
        if self._squares is None:
            self._squares = row_squares(weight, m.dtype)
        return Magnitude(m, self._squares)


class _Quantized(_Own):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name, layer = self.only((args, kwargs)), cast(Any, self)
        if name is None or name in layer.lora_magnitude_vector:
            plain: Tensor = cast(Any, super()).forward(x, *args, **kwargs)
            return plain
        return lora_added(x, layer.get_base_layer()(x), *self.adapter(name))


class LoraLinear4bit(_Quantized, Linear4bit):
    """PEFT's layer over bitsandbytes' 4-bit one, in all but its forward pass."""


class LoraLinear8bit(_Quantized, Linear8bitLt):
    """PEFT's layer over bitsandbytes' int8 one, in all but its forward pass."""


_OWN: dict[type[nn.Module], type[nn.Module]] = {
    Linear: LoraLinear,
    Linear4bit: LoraLinear4bit,
    Linear8bitLt: LoraLinear8bit,
}


def use_own_arithmetic(layer: Any) -> None:
    """Give a layer that PEFT made its own forward pass here, if it has one."""
    base = layer.get_base_layer()
    if type(layer) is not Linear or (isinstance(base, nn.Linear) and not is_quantized(base.weight)):
        layer.__class__ = _OWN.get(type(layer), type(layer))


def all_of(layers: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """Each layer's output for the same x [..., in]: together where all are frozen linear layers, bare or with LoRA that
    drops nothing and is no DoRA, else one after the other."""
    parts = [part for layer in layers if (part := _plain_part(layer)) is not None]
    return joint_linear(x, parts) if len(parts) == len(layers) else tuple(layer(x) for layer in layers)


def _plain_part(layer: Any) -> Layer | None:
    if type(layer) is nn.Linear and not layer.weight.requires_grad and not is_quantized(layer.weight):
        return Layer.bare(layer.weight, layer.bias)
    if not isinstance(layer, LoraLinear) or (name := layer.only(())) is None or name in layer.lora_magnitude_vector:
        return None
    low_rank, scale, dropout = layer.adapter(name)
    base: Any = layer.get_base_layer()
    return None if dropout else Layer(base.weight, base.bias, *low_rank, scale)


def is_quantized(weight: Tensor) -> bool:
    """Whether bitsandbytes holds it: int8, or 4-bit codes that may pose as floats."""
    return not weight.is_floating_point() or hasattr(weight, "quant_type")


@contextmanager
def plain_layers(model: nn.Module) -> Iterator[None]:
    """PEFT's own forward pass in every layer, for as long as the block lasts."""
    layers = [module for module in model.modules() if isinstance(module, _Own)]
    for layer in layers:
        layer.plain = True
    try:
        yield
    finally:
        for layer in layers:
            layer.plain = False

"""What LoRA has to know of a model, without the model: its layers by path, with their shapes, and how large it is."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn


class Layer(NamedTuple):
    """A layer that can have LoRA."""

    inputs: int
    """Features, or channels of a convolution."""
    outputs: int
    kernel: tuple[int, ...]
    """() of a linear layer."""
    head: bool
    shared: bool
    """Whether its weight is another layer's too."""

    def lora_parameters(self, rank: int, *, dora: bool) -> int:
        """Elements of A [r, in, *kernel], B [out, r] and DoRA's magnitude [out]."""
        return rank * (self.inputs * math.prod(self.kernel) + self.outputs) + (self.outputs if dora else 0)


@dataclass(frozen=True)
class Outline:
    layers: Mapping[str, Layer]
    """Those that can have LoRA, by path, in the model's order."""
    modules: tuple[str, ...]
    """The paths of all its modules."""
    parameters: int
    """Shared ones once."""

    @classmethod
    def of(cls, model: nn.Module) -> "Outline":
        """``model`` may be on the meta device."""
        find_head: Callable[[], nn.Module | None] = getattr(model, "get_output_embeddings", lambda: None)
        head, owners = find_head(), dict[int, int]()
        for _, parameter in model.named_parameters(remove_duplicate=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        layers = {
            name: Layer(*sizes(layer), kernel_of(layer), layer is head, owners[id(layer.weight)] > 1)
            for name, layer in adaptable(model).items()
        }
        modules = tuple(name for name, _ in model.named_modules())
        return cls(layers, modules, sum(parameter.numel() for parameter in model.parameters()))

    def as_table(self) -> dict[str, Any]:
        """For JSON."""
        return {"layers": dict(self.layers), "modules": self.modules, "parameters": self.parameters}

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> "Outline":
        """The inverse of ``as_table``, by way of JSON."""
        layers = {
            name: Layer(inputs, outputs, tuple(kernel), head, shared)
            for name, (inputs, outputs, kernel, head, shared) in table["layers"].items()
        }
        return cls(layers, tuple(table["modules"]), table["parameters"])


def adaptable(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every layer that can have LoRA; a wrapped one under its own path."""
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    for name, module in model.named_modules():
        inside_lora = not {"lora_A", "lora_B"}.isdisjoint(name.split("."))
        if not inside_lora and (
            isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        ):
            found[name.removesuffix(".base_layer")] = module
    return found


def sizes(layer: nn.Linear | nn.Conv2d | nn.Embedding) -> tuple[int, int]:
    """Features in and out, or channels; of an embedding [V, D] D and V, like the head's that shares its weight."""
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, layer.num_embeddings
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    return layer.in_features, layer.out_features


def kernel_of(layer: nn.Module) -> tuple[int, ...]:
    """A convolution's kernel, () of another layer."""
    return layer.kernel_size if isinstance(layer, nn.Conv2d) else ()

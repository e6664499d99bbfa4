"""Puts LoRA into a model and takes it out again; PEFT does the wrapping, this decides what, and with which numbers.

The wrapped layers compute W x + scale * B A x with A [r, in] and B [out, r] in float32 over a frozen W of any dtype.
"""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.delta import Delta
from lorakit.adapters.linear import is_quantized, use_own_arithmetic
from lorakit.adapters.merging.change import Change, not_alone
from lorakit.adapters.outline import Outline
from lorakit.adapters.peft_lora import LoraConfig, LoraLayer, inject_adapter_in_model
from lorakit.adapters.targets import Injection, fit, injection
from lorakit.errors import ModelError
from lorakit.recipe.schema import Adapter

__all__ = [
    "NAME", "adapter_parameters", "adapter_state", "apply", "fold", "inject", "load_adapter_state",
    "lora_layers", "set_scale",
]  # fmt: skip

NAME = "default"
"""The trained adapter's name inside PEFT."""


def inject(model: nn.Module, adapter: Adapter, groups: Mapping[str, Sequence[str]], *, seed: int) -> Injection:
    """Freeze ``model`` and put trainable LoRA into it, in place, float32 whatever the base's dtype.

    ``groups`` gives the patterns behind ``attention`` and ``attention+mlp``; ``all-linear`` is every nn.Linear but
    the head. A starts as N(0, std 1/r) (gaussian) or uniform within 1/sqrt(in) (kaiming), drawn from ``seed`` alone;
    B starts as 0, and DoRA's magnitude as the row norms of W. The global random state stays as it was.

    Raises RecipeError when a target or pattern matches nothing, a layer does not exist, a weight is shared, or the
    rank is more than a layer's features.
    """
    found = injection(Outline.of(model), adapter, groups)
    ranks = {target.name: target.rank for target in found.targets}
    options = {"lora_dropout": adapter.dropout, "use_rslora": adapter.rslora, "use_dora": adapter.dora}
    wrapped = _wrap(model, ranks, found.alphas, NAME, options)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for target in found.targets:
        layer = wrapped[target.name]
        _float32(layer, NAME, adapter.dora)
        parts = _parameters(layer, NAME)
        a = torch.empty(parts["lora_A.weight"].shape)
        if adapter.init == "gaussian":
            a.normal_(0, 1 / target.rank, generator=generator)
        else:
            bound = 1 / math.sqrt(a[0].numel())
            a.uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            parts["lora_A.weight"].copy_(a)
            parts["lora_B.weight"].zero_()
        for parameter in parts.values():
            parameter.requires_grad_(True)
    return found


def _wrap(
    model: nn.Module, ranks: Mapping[str, int], alphas: Mapping[str, float], name: str, options: Mapping[str, Any]
) -> dict[str, LoraLayer]:
    """PEFT's wrapping of exactly the modules in ``ranks``; its draws of random numbers leave no trace."""

    def pattern(values: Mapping[str, float]) -> dict[Any, Any]:
        groups: dict[float, list[str]] = {}
        for module, value in values.items():
            groups.setdefault(value, []).append(re.escape(module))
        return {f"^({'|'.join(modules)})": value for value, modules in groups.items()}

    config = LoraConfig(
        target_modules="|".join(map(re.escape, ranks)),
        rank_pattern=pattern(ranks),
        alpha_pattern=pattern(alphas),
        **options,
    )
    gpus = {parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(gpus)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, model, adapter_name=name)
    made = {path: layer for path, layer in lora_layers(model).items() if name in layer.lora_A}
    for layer in made.values():
        use_own_arithmetic(layer)
    return made


def _float32(layer: LoraLayer, name: str, new_magnitude: bool) -> None:
    for parameter in _parameters(layer, name).values():
        parameter.data = parameter.data.float()
    weight = _base_weight(layer)
    if new_magnitude and not is_quantized(weight):
        magnitude = _parameters(layer, name)["lora_magnitude_vector"]
        magnitude.data = torch.linalg.vector_norm(weight.float().flatten(1), dim=1).reshape(magnitude.shape)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The wrapped layers by module path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def _base_weight(layer: LoraLayer) -> Tensor:
    base: Any = layer.get_base_layer()
    weight: Tensor = base.weight
    return weight


def _parameters(layer: Any, name: str) -> dict[str, nn.Parameter]:
    found = {"lora_A.weight": layer.lora_A[name].weight, "lora_B.weight": layer.lora_B[name].weight}
    if name in layer.lora_magnitude_vector:
        found["lora_magnitude_vector"] = layer.lora_magnitude_vector[name].weight
    return found


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained adapter's parameters: ``{path}.lora_A.weight``, ``.lora_B.weight``, ``.lora_magnitude_vector``."""
    return {
        f"{path}.{key}": parameter
        for path, layer in lora_layers(model).items()
        if NAME in layer.lora_A
        for key, parameter in _parameters(layer, NAME).items()
    }


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of ``adapter_parameters`` on the CPU."""
    return {key: p.detach().to("cpu", copy=True).contiguous() for key, p in adapter_parameters(model).items()}


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what ``adapter_state`` gave.

    Raises ModelError naming the first tensor that is missing, unexpected, of another shape, or not finite; the model
    is then as it was.
    """
    parameters = adapter_parameters(model)
    for key in sorted(parameters.keys() ^ state.keys()):
        raise ModelError("the tensor is missing" if key in parameters else "the model has no such tensor", where=key)
    for key, parameter in parameters.items():
        if state[key].shape != parameter.shape:
            raise ModelError(f"shape {tuple(state[key].shape)}, not {tuple(parameter.shape)}", where=key)
        if not torch.isfinite(state[key]).all():
            raise ModelError("NaN or infinity", where=key)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(state[key])


def apply(model: nn.Module, deltas: Mapping[str, Delta], *, weight: float, name: str) -> None:
    """Put a saved adapter's component into a model for generation, frozen, its change taken ``weight`` times.

    Several may be applied one after another under different names; their changes add up.
    Raises ModelError when a module is missing, a shape differs, or DoRA meets another adapter.
    """
    paths = fit(model, deltas)
    dora = {delta.magnitude is not None for delta in deltas.values()}
    if len(dora) != 1:
        raise ModelError("some modules have DoRA magnitudes and some have not" if dora else "no module in the adapter")
    if lora_layers(model) and (
        True in dora or any(layer.lora_magnitude_vector for layer in lora_layers(model).values())
    ):
        raise not_alone()
    ranks = {paths[key]: delta.rank for key, delta in deltas.items()}
    alphas = {paths[key]: delta.scale * delta.rank for key, delta in deltas.items()}
    wrapped = _wrap(model, ranks, alphas, name, {"use_dora": dora.pop()})
    with torch.no_grad():
        for key, delta in deltas.items():
            layer = wrapped[paths[key]]
            _float32(layer, name, new_magnitude=False)
            values = (delta.A, delta.B, *([] if delta.magnitude is None else [delta.magnitude]))
            for parameter, value in zip(_parameters(layer, name).values(), values, strict=True):
                parameter.copy_(value.reshape(parameter.shape))
    for layer in lora_layers(model).values():
        layer.set_adapter(list(layer.lora_A), inference_mode=True)
    model.requires_grad_(False)
    set_scale(model, weight, name)


def set_scale(model: nn.Module, weight: float, name: str = NAME) -> None:
    """Take an adapter's change ``weight`` times; 1 is as trained. For DoRA the magnitude stays at its full effect."""
    for layer in lora_layers(model).values():
        layer.set_scale(name, weight)


def fold(model: nn.Module, dtypes: Mapping[str, torch.dtype] | None = None) -> None:
    """Add every adapter into its weight and remove the wrapping: a merge's float32 sums, one rounding to the weight's
    dtype, or to the one that ``dtypes`` has under its name. A head that shares the embedding's weight gets its own.

    Raises ModelError, and leaves the model as it was, when a base is quantized or a sum is not finite in its dtype.
    """
    layers = lora_layers(model)
    sums = {}
    for path, layer in layers.items():
        weight = _base_weight(layer)
        if is_quantized(weight):
            raise ModelError("the base is quantized: its weights cannot take the adapter in", where=path)
        terms = [(_delta(layer, name), 1.0) for name in layer.active_adapters if name in layer.lora_A]
        dtype = (dtypes or {}).get(f"{path}.weight", weight.dtype)
        total = Change(terms).added(weight).to(dtype)
        if not torch.isfinite(total).all():
            raise ModelError(f"the sum overflows {dtype}", where=path)
        sums[path] = total.to("cpu")  # a GPU may have no room for all layers twice
    for path, layer in layers.items():
        base: Any = layer.get_base_layer()
        base.weight = nn.Parameter(sums.pop(path).to(base.weight), requires_grad=base.weight.requires_grad)
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, base)
    if layers:
        del model.peft_config


def _delta(layer: LoraLayer, name: str) -> Delta:
    values = [parameter.detach() for parameter in _parameters(layer, name).values()]
    magnitude = values[2].flatten() if len(values) == 3 else None
    return Delta(values[0], values[1], layer.scaling[name], magnitude)

"""Base + adapters computed from their files, without merging: what a merged model is compared with.

A weight is read in float32, a few rows at a time, for the moment in which its layer needs them, so that a model of any
size runs in little memory. LoRA stands beside its layer as it was trained: y = W x + scale * B (A x).

A model that is told what it was merged into takes its inputs twice over, and computes the second half of them with
random errors as large as those of the merge's rounding.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from lorakit.adapters.files import assemble
from lorakit.adapters.merging.base import Home, OpenBase
from lorakit.adapters.merging.layers import STREAMED, Weight, in_halves
from lorakit.adapters.merging.plan import PlannedAdapter
from lorakit.adapters.merging.rounding import small_error
from lorakit.adapters.merging.source import FileSource
from lorakit.adapters.merging.tied import tied_by_config, tied_names, with_tied
from lorakit.adapters.merging.turned import Turned
from lorakit.adapters.whole import added_biases
from lorakit.errors import ModelError

Weights = dict[str, dict[str, Weight]]
"""By component and tensor name."""


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made in this block have parameters without memory, and buffers with their values."""
    plain = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        bare = None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False)
        plain(module, name, bare)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def run_from_files(base: OpenBase, adapters: Sequence[PlannedAdapter] = (), into: OpenBase | None = None) -> None:
    """Let the components of a base, made in ``parameters_on_meta``, compute from its files in float32, with all of each
    adapter as many times as its weight says.

    ``into`` is what they were merged into: the second half of every batch is computed with random errors in the place
    of its rounding. ModelError when a tensor is missing, or an adapter does not fit.
    """
    models = {component: model.float().eval() for component, model in base.models.items()}
    tied = tied_names(base)
    weights = {component: _weights(base, component, model, tied) for component, model in models.items()}
    for adapter in adapters:
        _put_on(weights, models, adapter)
    if into is not None:
        for component, own in weights.items():
            for name, weight in own.items():
                home = _home_of(into, component, name, tied)
                weight.into = into.sources[home.file].slots[home.name].dtype
    for component, model in models.items():
        for path, module in model.named_modules():
            _read_in(module, {name: weights[component].get(f"{path}.{name}".lstrip(".")) for name in _own(module)})


def _home_of(base: OpenBase, component: str, name: str, tied: tuple[str, str] | None) -> Home:
    """Where a tensor is; a tied head is where its embedding is."""
    head, embedding = tied or ("", "")
    home = base.home(component, name) or (base.home(component, embedding) if name == head else None)
    if home is None:
        raise ModelError(f"{component} lacks a tensor", where=name)
    return home


def _weights(base: OpenBase, component: str, model: nn.Module, tied: tuple[str, str] | None) -> dict[str, Weight]:
    found = {}
    for name, tensor in model.state_dict().items():
        home = _home_of(base, component, name, tied)
        source = base.sources[home.file]
        slot, height = source.slots[home.name], home.last - home.first
        held = (slot.columns, slot.rows) if home.turned else (height, slot.columns)
        if math.prod(held) != tensor.numel() or (tensor.dim() and held[0] != tensor.shape[0]):
            raise ModelError(f"{held} rows and columns in the file, {tuple(tensor.shape)} in the model", where=name)
        found[name] = Weight(Turned(source) if home.turned else source, home, tuple(tensor.shape))
    return found


def _put_on(weights: Weights, models: Mapping[str, nn.Module], adapter: PlannedAdapter) -> None:
    saved, share = assemble(adapter.path, adapter.pieces, models, whole=True), adapter.weight
    for (component, module), delta in saved.all_deltas().items():
        weights[component][f"{module}.weight"].lora.append((delta, share))
    tied = tied_by_config(models)
    for piece in adapter.pieces:
        own = weights[piece.component]
        source = FileSource(piece.path) if piece.whole else None
        for name, key in piece.whole.items():
            assert source is not None
            own[name].whole.append((source, key, share))
        for module, tokens in piece.tokens.items():
            for name in with_tied(f"{module}.weight", piece.tokens, tied):
                own[name].tokens.append((tokens, share))
        for name, added in added_biases(piece.biases, saved.components.get(piece.component, {})).items():
            own[name].lora.append((added, share))


def _own(module: nn.Module) -> list[str]:
    """Names of a module's own parameters and of the buffers that are saved."""
    return list(module.state_dict(keep_vars=True).keys() & {*module._parameters, *module._buffers})


def _read_in(module: Any, own: Mapping[str, Weight | None]) -> None:
    """Large weights stay in their files, the others are read."""
    streamed, errors = None, {}
    for name, weight in own.items():
        if weight is None:
            continue
        if name == "weight" and type(module) in STREAMED:
            streamed = weight
            continue
        tensor = weight.tensor()
        if weight.rounded is not None:
            errors[name] = small_error(weight.rounded, weight.name, tensor)
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[name] = tensor.to(module._buffers[name].dtype)
    if streamed is not None:
        module.forward = partial(STREAMED[type(module)], module, streamed, errors.get("bias"))
    elif errors:
        module.forward = partial(in_halves, module, module.forward, errors)

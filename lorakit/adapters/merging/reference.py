"""Base + adapters computed from their files, without merging: what a merged model is compared with.

A weight is read in float32, a few rows at a time, for the moment in which its layer needs them, so that a model of any
size runs in little memory. LoRA stands beside its layer as it was trained: y = W x + scale * B (A x).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorakit.adapters.delta import Delta, product
from lorakit.adapters.files import assemble
from lorakit.adapters.merging.base import Home, OpenBase
from lorakit.adapters.merging.plan import PlannedAdapter
from lorakit.adapters.merging.source import FileSource, Source
from lorakit.adapters.merging.stream import worked
from lorakit.adapters.merging.tied import tied_by_config, tied_names
from lorakit.adapters.merging.turned import Turned
from lorakit.adapters.whole import Tokens, added_biases
from lorakit.errors import ModelError

BLOCK = 4 << 20
"""Numbers of a weight that are in memory at a time."""


class Weight:
    """A model's tensor in a file, and what adapters make of it, each ``share`` times."""

    def __init__(self, source: Source, home: Home, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.lora: list[tuple[Delta, float]] = []
        """LoRA, which ``rows`` leaves out."""
        self.whole: list[tuple[Source, str, float]] = []
        """Tensors in its place."""
        self.tokens: list[tuple[Tokens, float]] = []
        """Single rows in the place of its own."""
        self._source, self._name = source, home.name
        self._first = 0 if home.turned else home.first

    @property
    def height(self) -> int:
        return self.shape[0] if self.shape else 1

    def rows(self, first: int, last: int) -> Tensor:
        """float32 [last - first, ...], not to be written to, and there until rows are asked for again."""
        before = worked(self._source.rows(self._name, self._first + first, self._first + last), torch.float32)
        after = before.clone() if self.whole or self.tokens else before
        for source, key, share in self.whole:
            after += share * (source.rows(key, first, last).float() - before)
        for tokens, share in self.tokens:
            inside = (tokens.indices >= first) & (tokens.indices < last)
            at = tokens.indices[inside] - first
            after[at] += share * (tokens.values[inside].float() - before[at])
        return after.view(last - first, *self.shape[1:])

    def blocks(self) -> Iterator[tuple[int, int]]:
        """All rows, in spans of about ``BLOCK`` numbers."""
        step = max(1, BLOCK * self.height // max(1, torch.Size(self.shape).numel()))
        for first in range(0, self.height, step):
            yield first, min(first + step, self.height)

    def tensor(self) -> Tensor:
        """All of it with all changes, in its shape."""
        total = self.rows(0, self.height).clone().view(self.shape)
        for delta, share in self.lora:
            total += share * product(delta).view(self.shape)
        return total


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


def run_from_files(base: OpenBase, adapters: Sequence[PlannedAdapter] = ()) -> None:
    """Let the components of a base, made in ``parameters_on_meta``, compute from its files in float32, with all of each
    adapter as many times as its weight says. ModelError when a tensor is missing, or an adapter does not fit.
    """
    models = {component: model.float().eval() for component, model in base.models.items()}
    tied = tied_names(base)
    weights = {component: _weights(base, component, model, tied) for component, model in models.items()}
    for adapter in adapters:
        _put_on(weights, models, adapter)
    for component, model in models.items():
        for path, module in model.named_modules():
            _read_in(module, {name: weights[component].get(f"{path}.{name}".lstrip(".")) for name in _own(module)})


def _weights(base: OpenBase, component: str, model: nn.Module, tied: tuple[str, str] | None) -> dict[str, Weight]:
    head, embedding = tied or ("", "")
    found = {}
    for name, tensor in model.state_dict().items():
        home = base.home(component, name) or (base.home(component, embedding) if name == head else None)
        if home is None:
            raise ModelError(f"{component} lacks a tensor", where=name)
        source = base.sources[home.file]
        slot, height = source.slots[home.name], home.last - home.first
        held = (slot.columns, slot.rows) if home.turned else (height, slot.columns)
        if math.prod(held) != tensor.numel() or (tensor.dim() and held[0] != tensor.shape[0]):
            raise ModelError(f"{held} rows and columns in the file, {tuple(tensor.shape)} in the model", where=name)
        found[name] = Weight(Turned(source) if home.turned else source, home, tuple(tensor.shape))
    return found


def _put_on(weights: Weights, models: Mapping[str, nn.Module], adapter: PlannedAdapter) -> None:
    """Tokens of a tied embedding are the head's too; all else parts them."""
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
            for name in {f"{module}.weight", *(tied if tied and f"{module}.weight" == tied[1] else ())}:
                own[name].tokens.append((tokens, share))
        for name, added in added_biases(piece.biases, saved.components.get(piece.component, {})).items():
            own[name].lora.append((added, share))


def _own(module: nn.Module) -> list[str]:
    """Names of a module's own parameters and of the buffers that are saved."""
    return list(module.state_dict(keep_vars=True).keys() & {*module._parameters, *module._buffers})


def _read_in(module: Any, own: Mapping[str, Weight | None]) -> None:
    """Large weights stay in their files, the others are read."""
    for name, weight in own.items():
        forward = _STREAMED.get(type(module)) if name == "weight" else None
        if weight is None:
            continue
        if forward is not None:
            module.forward = partial(forward, module, weight)
        elif name in module._parameters:
            module._parameters[name] = nn.Parameter(weight.tensor(), requires_grad=False)
        else:
            module._buffers[name] = weight.tensor().to(module._buffers[name].dtype)


def _linear(module: Any, weight: Weight, x: Tensor) -> Tensor:
    """[..., in] -> [..., out]"""
    out = torch.cat(list(_outputs(weight, partial(functional.linear, x), functional.linear, (-1,))), -1)
    return out if module.bias is None else out + module.bias


def _convolution(module: Any, weight: Weight, x: Tensor) -> Tensor:
    """[B, in, h, w] -> [B, out, h', w']"""
    window = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}

    def convolve(w: Tensor) -> Tensor:
        return functional.conv2d(x, w, **window)

    def up(low: Tensor, b: Tensor) -> Tensor:
        return functional.conv2d(low, b[:, :, None, None])

    out = torch.cat(list(_outputs(weight, convolve, up, (-1, 1, 1))), 1)
    return out if module.bias is None else out + module.bias[:, None, None]


def _outputs(
    weight: Weight,
    times: Callable[[Tensor], Tensor],
    up: Callable[[Tensor, Tensor], Tensor],
    along: tuple[int, ...],
) -> Iterator[Tensor]:
    """A layer's outputs, a few channels at a time: W x + scale * B (A x), with DoRA each row m / norm(W + scale * B A)
    times as much. ``times`` gives a matrix' product with x, ``up`` that of rows of B with A x; ``along`` is the shape
    that lays one number a channel beside its outputs.
    """
    lora = [(delta, times(delta.A.float()), share * delta.scale) for delta, share in weight.lora]
    for first, last in weight.blocks():
        rows = weight.rows(first, last)
        out = times(rows)
        for delta, low, scale in lora:
            b = delta.B.float().flatten(1)[first:last]
            out = out + scale * up(low, b)
            if delta.magnitude is not None:
                total = rows.flatten(1) + scale * (b @ delta.A.float().flatten(1))
                out = out * (delta.magnitude[first:last].float() / total.norm(dim=1)).view(along)
        yield out


def _embedding(_module: Any, weight: Weight, ids: Tensor) -> Tensor:
    """[...] -> [..., D]"""
    tokens, places = torch.unique(ids, return_inverse=True)
    rows = torch.cat([weight.rows(token, token + 1).clone() for token in tokens.tolist()])
    for delta, share in weight.lora:
        rows = rows + share * delta.scale * (delta.B.float()[tokens] @ delta.A.float())
    return rows[places]


_STREAMED: dict[type, Callable[..., Tensor]] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.Embedding: _embedding,
}


def difference(reference: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Of tensors [rows, ...]: root mean square of found - reference as a share of the
    reference's own spread around its mean."""
    pairs = [pair for one, other in zip(reference, found, strict=True) for pair in zip(one, other, strict=True)]
    count = sum(one.numel() for one, _ in pairs)
    mean = sum(float(one.double().sum()) for one, _ in pairs) / count
    spread = sum(float((one.double() - mean).square().sum()) for one, _ in pairs)
    error = sum(float((other.double() - one).square().sum()) for one, other in pairs)
    return math.sqrt(error / max(spread, 1e-300))

"""Layers that read their weight from its file, a few rows at a time, while they compute."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorakit.adapters.delta import Delta, product
from lorakit.adapters.merging.base import Home
from lorakit.adapters.merging.rounding import error_of, random_error
from lorakit.adapters.merging.source import Source
from lorakit.adapters.merging.stream import READ, Span, worked
from lorakit.adapters.whole import Tokens


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
        self.into: torch.dtype | None = None
        """The dtype in which it was merged."""
        self.rounded: torch.dtype | None = None
        """The same, when it rounded the rows that were last asked for."""
        self.name = home.name
        self._source = source
        self._first = 0 if home.turned else home.first

    @property
    def height(self) -> int:
        return self.shape[0] if self.shape else 1

    def rows(self, first: int, last: int) -> Tensor:
        """float32 [last - first, ...], not to be written to, and there until rows are asked for again."""
        read = self._source.rows(self.name, self._first + first, self._first + last)
        changed = bool(self.lora or self.whole or self.tokens)
        self.rounded = self.into if changed or read.dtype != self.into else None
        before = worked(read, torch.float32)
        after = worked(before, torch.float32, 1) if self.whole or self.tokens else before
        for source, key, share in self.whole:
            after.add_(worked(source.rows(key, first, last), torch.float32, 2).sub_(before), alpha=share)
        for tokens, share in self.tokens:
            inside = (tokens.indices >= first) & (tokens.indices < last)
            at = tokens.indices[inside] - first
            after[at] += share * (tokens.values[inside].float() - before[at])
        return after.view(last - first, *self.shape[1:])

    def blocks(self) -> Iterator[tuple[int, int]]:
        """All rows, in the blocks in which a merge writes them."""
        span = Span(self._source, self.name, self._first, self._first + self.height)
        for first, last in span.blocks(READ // self._source.slots[self.name].dtype.itemsize):
            yield first - self._first, last - self._first

    def tensor(self) -> Tensor:
        """All of it with all changes, in its shape."""
        total = self.rows(0, self.height).clone().view(self.shape)
        for delta, share in self.lora:
            total += share * product(delta).view(self.shape)
        return total


def _half(x: Tensor) -> int:
    """Where the second half of a batch [2B, ...] begins: behind the end of what is looked up once for all of it, such
    as CLIP's positions [1, L]."""
    return len(x) if len(x) % 2 else len(x) // 2


def in_halves(module: Any, forward: Callable[..., Any], errors: Mapping[str, Tensor], *args: Any, **named: Any) -> Any:
    """A layer of one input [2B, ...], such as a norm: the second half of it with errors in the layer's parameters."""
    if len(args) != 1 or named or len(args[0]) % 2:
        return forward(*args, **named)
    (x,), half, right = args, _half(args[0]), dict(module._parameters)
    first = forward(x[:half])
    try:
        for name in errors.keys() & right:
            module._parameters[name] = nn.Parameter(right[name] + errors[name], requires_grad=False)
        return torch.cat([first, forward(x[half:])])
    finally:
        module._parameters.update(right)


def _linear(module: Any, weight: Weight, bias_error: Tensor | None, x: Tensor) -> Tensor:
    """[..., in] -> [..., out]"""
    out = torch.cat(list(_outputs(weight, x, functional.linear, functional.linear, (-1,))), -1)
    return _with_bias(out, module.bias, bias_error, (-1,))


def _convolution(module: Any, weight: Weight, bias_error: Tensor | None, x: Tensor) -> Tensor:
    """[B, in, h, w] -> [B, out, h', w']"""
    window = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}

    def up(low: Tensor, b: Tensor) -> Tensor:
        return functional.conv2d(low, b[:, :, None, None])

    out = torch.cat(list(_outputs(weight, x, partial(functional.conv2d, **window), up, (-1, 1, 1))), 1)
    return _with_bias(out, module.bias, bias_error, (-1, 1, 1))


def _with_bias(out: Tensor, bias: Tensor | None, error: Tensor | None, along: tuple[int, ...]) -> Tensor:
    if bias is not None:
        out += bias.view(along)
    if error is not None:
        out[_half(out) :] += error.view(along)
    return out


Times = Callable[[Tensor, Tensor], Tensor]


def _outputs(weight: Weight, x: Tensor, times: Times, up: Times, along: tuple[int, ...]) -> Iterator[Tensor]:
    """A layer's outputs, a few channels at a time: W x + scale * B (A x), with DoRA each row m / norm(W + scale * B A)
    times as much; E x more in the second half of what is rounded. ``times`` gives x' product with a matrix, ``up`` that
    of A x with rows of B; ``along`` is the shape that lays one number a channel beside its outputs.
    """
    lora = [(delta, times(x, delta.A.float()), share * delta.scale) for delta, share in weight.lora]
    half, errors = _half(x), None
    for first, last in weight.blocks():
        rows = weight.rows(first, last)
        out, square = times(x, rows), _square(rows)
        for delta, low, scale in lora:
            b, a = delta.B.float().flatten(1)[first:last], delta.A.float().flatten(1)
            out = out + scale * up(low, b)
            square += scale**2 * float(((b.T @ b) * (a @ a.T)).sum())  # norm(B A), multiplied out in r columns
            if delta.magnitude is not None:
                magnitude = delta.magnitude[first:last].float()
                summed = worked(rows.flatten(1), torch.float32, 2).addmm_(b, a, alpha=scale)
                out = out * (magnitude / torch.linalg.vector_norm(summed, dim=1)).view(along)
                square = _square(magnitude)
        if weight.rounded is not None:
            if errors is None:
                a, b = random_error(weight.name, weight.shape)
                errors = times(x[half:], a), b
            out[half:] += error_of(weight.rounded, square, rows.numel()) * up(errors[0], errors[1][first:last])
        yield out


def _square(numbers: Tensor) -> float:
    return float(torch.dot(numbers.flatten(), numbers.flatten()))


def _embedding(_module: Any, weight: Weight, _: None, ids: Tensor) -> Tensor:
    """[...] -> [..., D]"""
    tokens, places = torch.unique(ids, return_inverse=True)
    rows = torch.cat([weight.rows(token, token + 1).clone() for token in tokens.tolist()])
    for delta, share in weight.lora:
        rows = rows + share * delta.scale * (delta.B.float()[tokens] @ delta.A.float())
    out = rows[places]
    if weight.rounded is not None:
        error, half = random_error(weight.name, weight.shape), _half(ids)
        size = error_of(weight.rounded, _square(rows), rows.numel())
        out[half:] += size * (error.B[tokens] @ error.A)[places[half:]]
    return out


STREAMED: dict[type, Callable[..., Tensor]] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.Embedding: _embedding,
}

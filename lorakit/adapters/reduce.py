"""Adapters by singular values: from two full models, and from an adapter of a higher rank."""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lorakit.adapters.delta import Delta, SavedAdapter, told_as
from lorakit.adapters.formats import bare
from lorakit.adapters.merging.base import Home, OpenBase
from lorakit.adapters.merging.source import FLOATS, Source
from lorakit.adapters.merging.tied import tied_by_config
from lorakit.adapters.merging.turned import Turned
from lorakit.adapters.outline import adaptable
from lorakit.adapters.whole import EMBEDDINGS
from lorakit.errors import ModelError
from lorakit.numerics.low_rank import factor, thin

LOG = logging.getLogger("lorakit")
BLOCK = 1 << 20
"""Numbers of a tensor that are compared at a time."""
Name = tuple[str, str]
"""A component and its tensor."""


class FullModel(NamedTuple):
    """A whole model in its files, and what it is called."""

    name: str
    opened: OpenBase


class Stored(NamedTuple):
    """A model's tensor in a file."""

    source: Source
    home: Home
    shape: tuple[int, ...]
    """In the model."""

    def tensor(self) -> Tensor:
        """Not to be written to; in the file's shape where that is another one."""
        source = Turned(self.source) if self.home.turned else self.source
        slot = source.slots[self.home.name]
        first, last = (0, slot.rows) if self.home.turned else (self.home.first, self.home.last)
        rows = source.rows(self.home.name, first, last)
        return rows.view(self.shape if rows.numel() == math.prod(self.shape) else (len(rows), *slot.shape[1:]))


@dataclass(frozen=True)
class Kept:
    """What a rank keeps of a change. Shares are of the squared Frobenius norm."""

    modules: int
    share: float
    """Over all modules of the adapter together."""
    least: float
    least_module: str
    left_out: tuple[str, ...] = ()
    """Tensors that differ but that LoRA does not reach: norms, biases, embeddings."""
    left_share: float = 0.0
    """Their share of the whole difference."""


def resize(
    saved: SavedAdapter, rank: int, progress: Callable[[int, int], None] | None = None
) -> tuple[SavedAdapter, Kept]:
    """The best adapter of at most ``rank`` a module, with alpha = rank; a module that is no higher stays as it is. None
    is higher than its layer has inputs or outputs.

    DoRA's magnitudes stay: the direction is what is approximated. ``progress`` is told modules done, and in all.
    """
    parts: dict[str, dict[str, Delta]] = {}
    squares = []
    everything = saved.all_deltas()
    for number, ((component, path), delta) in enumerate(everything.items(), 1):
        b, a = delta.B.flatten(1).double() * delta.scale, delta.A.flatten(1).double()
        share, smaller = 1.0, delta
        if delta.rank > (most := min(rank, len(b), a.shape[1])):
            thin_b, thin_a, share = thin(b, a, most)
            smaller = _delta(thin_b, thin_a, delta.A.shape[1:], delta.B.dtype, delta.magnitude)
        parts.setdefault(component, {})[path] = smaller
        squares.append((told_as(component, path), float(((a @ a.T) * (b.T @ b)).sum()), share))
        if progress is not None:
            progress(number, len(everything))
    return replace(saved, components=parts), _kept(squares)


def extract(
    base: FullModel, tuned: FullModel, rank: int, progress: Callable[[int, int], None] | None = None
) -> tuple[SavedAdapter, Kept]:
    """The best adapter of at most ``rank`` for the difference of two full models, float32, with alpha = rank.

    One pair of weights is in memory at a time. Layers that are equal in both, or but for the rounding to the tuned
    model's dtype, get nothing. Raises ModelError when the models are not of one shape, or equal.
    """
    before, after = _stored(base.opened), _stored(tuned.opened)
    for own, opened in ((before, base.opened), (after, tuned.opened)):
        if (tied := tied_by_config(opened.models)) is not None and ("model", tied[0]) in before.keys() | after.keys():
            own.setdefault(("model", tied[0]), own["model", tied[1]])
    for name in sorted(before.keys() ^ after.keys()):
        has, lacks = (base.name, tuned.name) if name in before else (tuned.name, base.name)
        raise ModelError(f"{has} has it, {lacks} does not", where=told_as(*name))
    _tell_unknown(base, tuned)
    models = {component: model for component, model in base.opened.models.items() if component != "vae"}
    layers = {(c, f"{bare(path)}.weight"): path for c, model in models.items() for path in adaptable(model)}
    parts: dict[str, dict[str, Delta]] = {}
    squares: list[tuple[str, float, float]] = []
    left: dict[str, float] = {}
    for number, (name, place) in enumerate(before.items(), 1):
        one, other = _pair(".".join(name), place, after[name])
        square = 0.0 if torch.equal(one.to(other.dtype), other) else _square(".".join(name), one, other)
        if square and name in layers:
            component, path = name[0], layers[name]
            b, a, share = factor((other.float() - one.float()).flatten(1), rank)
            parts.setdefault(component, {})[path] = _delta(b, a, one.shape[1:], torch.float32, None)
            squares.append((told_as(component, path), square, share))
        elif square:
            left[".".join(name)] = square
        if progress is not None:
            progress(number, len(before))
    if not parts:
        raise ModelError(f"no layer differs from {base.name}'s", where=tuned.name)
    told = replace(_kept(squares), left_out=tuple(left))
    total = sum(left.values()) + sum(square for _, square, _ in squares)
    family: Literal["sd", "llama"] = "llama" if "model" in models else "sd"
    saved = SavedAdapter(family, parts, "peft", {"lorakit_base": base.name, "lorakit_extracted_from": tuned.name})
    return saved, replace(told, left_share=sum(left.values()) / total)


def _delta(b: Tensor, a: Tensor, inner: torch.Size, dtype: torch.dtype, magnitude: Tensor | None) -> Delta:
    """``inner`` is a weight's shape behind its outputs: [in] or [in, kh, kw]."""
    ones = (1,) * (len(inner) - 1)
    return Delta(a.reshape(-1, *inner).to(dtype), b.reshape(*b.shape, *ones).to(dtype), 1.0, magnitude)


def _kept(squares: Iterable[tuple[str, float, float]]) -> Kept:
    listed = list(squares)
    total = sum(square for _, square, _ in listed)
    name, _, least = min(listed, key=lambda entry: entry[2])
    share = sum(square * kept for _, square, kept in listed) / total if total else 1.0
    return Kept(len(listed), share, least, name)


def _stored(opened: OpenBase) -> dict[Name, Stored]:
    """Where each tensor is that the components have, but for a VAE, which nobody adapts."""
    found = {}
    for component, model in opened.models.items():
        for name, tensor in model.state_dict().items() if component != "vae" else ():
            if (home := opened.home(component, name)) is not None:
                found[component, bare(name)] = Stored(opened.sources[home.file], home, tuple(tensor.shape))
    return found


def _tell_unknown(base: FullModel, tuned: FullModel) -> None:
    """A warning for tensors of the tuned model's files that no layer takes. (Older files hold more: CLIP's
    position_ids.)"""
    new = []
    for component, model in tuned.opened.models.items():
        known = {bare(key) for key in model.state_dict()}
        for name, home in tuned.opened.homes.get(component, {}).items():
            is_float = tuned.opened.sources[home.file].slots[home.name].dtype in FLOATS
            if is_float and name not in known and base.opened.home(component, name) is None:
                new.append(f"{component}.{name}")
    if new:
        told = f"{', '.join(new[:3])}{' …' if len(new) > 3 else ''}"
        LOG.warning("%s: left out are %d tensors that no layer takes: %s", tuned.name, len(new), told)


def _pair(name: str, before: Stored, after: Stored) -> tuple[Tensor, Tensor]:
    one, other = before.tensor(), after.tensor()
    if one.shape != other.shape:
        grown = other.shape[1:] == one.shape[1:] and name.split(".")[-2] in EMBEDDINGS
        hint = f"the vocabulary has grown: transformers' resize_token_embeddings({len(other)}) makes a base for it"
        reason = f"{tuple(one.shape)} in one model, {tuple(other.shape)} in the other"
        raise ModelError(reason, where=name, hint=hint if grown and len(other) > len(one) else "")
    return one, other


def _square(name: str, one: Tensor, other: Tensor) -> float:
    """Squared norm of the difference, in float64 a block at a time; zero where either is no float."""
    if not one.is_floating_point() or not other.is_floating_point():
        return 0.0
    blocks = zip(torch.split(one.flatten(), BLOCK), torch.split(other.flatten(), BLOCK), strict=True)
    square = sum(float(after.double().sub_(before).square_().sum()) for before, after in blocks)
    if not math.isfinite(square):
        raise ModelError("NaN or infinity", where=name)
    return square

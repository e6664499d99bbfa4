"""Adapters by singular values: from two full models, and from an adapter of a higher rank."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lorakit.adapters.delta import Delta, SavedAdapter, told_as
from lorakit.adapters.formats import bare
from lorakit.adapters.merging.tied import tied_by_config
from lorakit.adapters.outline import adaptable
from lorakit.errors import ModelError, RecipeError
from lorakit.numerics.low_rank import factor, thin
from lorakit.storage import checks
from lorakit.storage.bases import BaseLocation

Models = Mapping[str, nn.Module]
BLOCK = 1 << 20
"""Numbers of a tensor that are compared at a time."""


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
    base: BaseLocation,
    tuned: BaseLocation,
    models: Models,
    rank: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[SavedAdapter, Kept]:
    """The best adapter of at most ``rank`` for the difference of two full models, float32, with alpha = rank.

    ``models``: the base's components, on meta if need be. One pair of weights is in memory at a time. Layers that are
    equal in both get nothing. Raises ModelError when the models are not of one shape, or equal.
    """
    before, after = (_index(location, models) for location in (base, tuned))
    if (shared := tied_by_config(models)) is not None:
        head, embedding = (f"model.{name}" for name in shared)
        for index in (before, after):
            if head not in index and embedding in index and head in before.keys() | after.keys():
                index[head] = index[embedding]
    for name in sorted(before.keys() ^ after.keys()):
        has, lacks = (base.name, tuned.name) if name in before else (tuned.name, base.name)
        raise ModelError(f"{has} has it, {lacks} does not", where=name)
    layers = {f"{c}.{bare(path)}.weight": (c, path) for c, model in models.items() for path in adaptable(model)}
    parts: dict[str, dict[str, Delta]] = {}
    squares: list[tuple[str, float, float]] = []
    left: dict[str, float] = {}
    for number, (name, place) in enumerate(before.items(), 1):
        one, other = _pair(name, place, after[name])
        square = _square(name, one, other)
        if square and name in layers:
            component, path = layers[name]
            b, a, share = factor(other.float().sub_(one).flatten(1), rank)
            parts.setdefault(component, {})[path] = _delta(b, a, one.shape[1:], torch.float32, None)
            squares.append((told_as(component, path), square, share))
        elif square:
            left[name] = square
        if progress is not None:
            progress(number, len(before))
    if not parts:
        raise ModelError(f"no layer differs from {base.name}'s", where=tuned.name)
    told = replace(_kept(squares), left_out=tuple(left))
    total = sum(left.values()) + sum(square for _, square, _ in squares)
    saved = SavedAdapter(base.family, parts, "peft", {"lorakit_base": base.name, "lorakit_extracted_from": tuned.name})
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


def _index(location: BaseLocation, models: Models) -> dict[str, tuple[Path, str]]:
    """Where each tensor that ``models`` have is, by component and name. (Older files hold more: CLIP's position_ids.)

    Raises RecipeError for a layout other than a folder.
    """
    if location.layout not in ("transformers", "diffusers"):
        raise RecipeError("an adapter is extracted from two folders of safetensors", where=location.name)
    known = {f"{component}.{bare(key)}" for component, model in models.items() for key in model.state_dict()}
    found = {f"{component}.{bare(key)}": (path, key) for component, path, key in _tensors(location)}
    return {name: place for name, place in found.items() if name in known}


def _tensors(location: BaseLocation) -> Iterator[tuple[str, Path, str]]:
    folders = {"model": (location.path, "model")}
    if location.layout == "diffusers":
        stems = checks.weight_stems(location.path)
        folders = {name: (location.path / name, stem) for name, stem in stems.items() if name != "vae"}
    for component, (folder, stem) in folders.items():
        for path in checks.shard_files(folder, stem):
            with safe_open(path, "pt") as file:
                yield from ((component, path, key) for key in file.keys())  # noqa: SIM118


def _pair(name: str, before: tuple[Path, str], after: tuple[Path, str]) -> tuple[Tensor, Tensor]:
    one, other = (_read(*place) for place in (before, after))
    if one.shape != other.shape:
        raise ModelError(f"{tuple(one.shape)} in one model, {tuple(other.shape)} in the other", where=name)
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


def _read(path: Path, key: str) -> Tensor:
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(key)
        return tensor

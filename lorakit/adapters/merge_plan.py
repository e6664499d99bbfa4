"""What a merge would write, worked out from headers: every tensor of every file, and what changes it."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from lorakit.adapters.carry import copy_rest, write_indexes
from lorakit.adapters.change import Change
from lorakit.adapters.delta import Delta
from lorakit.adapters.files import read_adapter
from lorakit.adapters.skeleton import load_gguf, skeleton
from lorakit.adapters.stream import FLOATS, FileSource, MemorySource, OutFile, Piece, Slot, Source, Target
from lorakit.errors import ConflictError, ModelError, ResourceError
from lorakit.storage import checks
from lorakit.storage.bases import BaseLocation

SHARD = 5_000_000_000
"""Bytes of a shard when a GGUF file becomes a folder."""
SPARE = 50_000_000
"""Bytes that the disk must have left for configs and tokenizer."""


class Home(NamedTuple):
    """Where a component's tensor is in the base: rows of a file's tensor."""

    file: str
    name: str
    first: int
    last: int


Homes = dict[str, dict[str, Home]]
"""By component and the model's own tensor name."""


@dataclass(frozen=True)
class Original:
    """A single-file checkpoint, as the family that knows its names sees it."""

    models: Mapping[str, nn.Module]
    """The components on the meta device."""
    names: Mapping[str, tuple[tuple[str, str], ...]]
    """Tensor in the file -> the (component, tensor) pairs that it stacks, by rows. Others belong to no component."""
    write_rest: Callable[[Path], None]
    """Writes a diffusers folder's files beside the weights."""


@dataclass(frozen=True)
class MergePlan:
    """All that a merge will do."""

    base: BaseLocation
    adapters: tuple[tuple[Path, float], ...]
    out: Path
    files: dict[str, OutFile]
    """By path inside ``out``; the one key ``""`` when ``out`` is a file itself."""
    changed: int
    """Weights that the adapters change."""
    write_rest: Callable[[Path], None]
    """Writes into a folder what comes along with the weights."""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files.values())


@dataclass(frozen=True)
class _Base:
    models: Mapping[str, nn.Module]
    sources: Mapping[str, Source]
    homes: Homes
    write_rest: Callable[[Path], None]


def plan_merge(
    base: BaseLocation,
    adapters: Sequence[tuple[Path, float]],
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    original: Original | None = None,
) -> MergePlan:
    """Map every tensor of the adapters, each taken ``weight`` times, to rows of one tensor of the base.

    ``out`` is a folder, or with a name that ends in ``.safetensors`` a single file when the base is one. ``dtype``
    (float32, float16, bfloat16) converts all floats; without it each tensor keeps its own, and a GGUF base, whose
    weights are de-quantized, becomes float16. ``original`` describes a single-file base.

    Raises ConflictError when ``out`` exists (unless ``overwrite``), or is the base or an adapter; ResourceError when
    the space does not suffice; ModelError when an adapter does not fit.
    """
    check_out(out, [("base", base.path), *(("adapter", path) for path, _ in adapters)], overwrite)
    if base.layout == "gguf":
        dtype = dtype or torch.float16
        opened = _open_gguf(base, dtype)
    else:
        opened = _open_folder(base, dtype) if original is None else _open_single(base, original)
    changes = _changes(opened, adapters)
    if out.suffix == ".safetensors":
        if original is None:
            raise ConflictError("a single file is made from a single-file base only", where=str(out))
        files = {"": _same_layout(opened, changes, dtype)[base.path.name]}
    elif original is not None:
        files = _unpacked(opened, changes, dtype)
    else:
        files = _same_layout(opened, changes, dtype)
    plan = MergePlan(base, tuple(adapters), out, files, len(changes), opened.write_rest)
    _check_space(plan)
    return plan


def check_out(out: Path, inputs: Sequence[tuple[str, Path]], overwrite: bool) -> None:
    """Raises ConflictError when OUT is, holds or is inside an input, or exists and may not be replaced."""
    target = out.resolve()
    for name, path in ((name, path.resolve()) for name, path in inputs):
        if target == path or target in path.parents or path in target.parents:
            raise ConflictError(f"OUT is the {name}, or inside it, or around it", where=str(out))
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise ConflictError("exists already", where=str(out), hint="choose another name, or --overwrite")
    kinds = ("config.json", "model_index.json")
    if out.suffix == ".safetensors":
        if out.is_symlink() or not out.is_file():
            raise ConflictError("not a file: it is not replaced", where=str(out))
    elif out.is_symlink() or not out.is_dir() or (any(out.iterdir()) and not any((out / k).is_file() for k in kinds)):
        raise ConflictError("not a model's folder: it is not replaced", where=str(out))


def _check_space(plan: MergePlan) -> None:
    parent = next(path for path in plan.out.resolve().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < plan.size + SPARE:
        raise ResourceError(
            f"the merged model takes {plan.size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free", where=str(parent)
        )


def _open_folder(base: BaseLocation, dtype: torch.dtype | None) -> _Base:
    models = skeleton(base)
    folders = {"model": ""} if base.layout == "transformers" else {name: f"{name}/" for name in checks.WEIGHTS}
    sources: dict[str, Source] = {}
    homes: Homes = {}
    for component, folder in folders.items():
        homes[component] = {}
        for path in checks.shard_files(base.path / folder, checks.WEIGHTS.get(component, "model")):
            source = FileSource(path)
            sources[folder + path.name] = source
            for name, slot in source.slots.items():
                bare = _bare(component, name)
                homes[component][bare] = Home(folder + path.name, name, 0, slot.rows)

    def write_rest(out: Path) -> None:
        copy_rest(base, out, dtype)

    return _Base(models, sources, homes, write_rest)


def _bare(component: str, name: str) -> str:
    """A tensor's name or module's path without what older transformers put before CLIP's."""
    return name.removeprefix("text_model.") if component.startswith("text_encoder") else name


def _open_single(base: BaseLocation, original: Original) -> _Base:
    source, homes = FileSource(base.path), Homes()
    for component, model in original.models.items():
        homes[component] = {}
        rows = {name: tensor.shape[0] if tensor.dim() else 1 for name, tensor in model.state_dict().items()}
        for key, parts in original.names.items():
            place = 0
            for owner, name in parts:
                size = source.slots[key].rows if len(parts) == 1 else rows[name] if owner == component else 0
                if owner == component:
                    homes[component][name] = Home(base.path.name, key, place, place + size)
                place += size
        for name in rows.keys() ^ homes[component].keys():
            reason = "is missing" if name in rows else "is left over"
            raise ModelError(f"{component}'s {name} {reason}", where=str(base.path))
    return _Base(original.models, {base.path.name: source}, homes, original.write_rest)


def _open_gguf(base: BaseLocation, dtype: torch.dtype) -> _Base:
    model, tokenizer = load_gguf(base)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, parameter in model.named_parameters():
        if size and size + parameter.nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = parameter
        size += parameter.nbytes
    form = "model.safetensors" if len(shards) == 1 else "model-{:05d}-of-{:05d}.safetensors"
    sources: dict[str, Source] = {
        form.format(number, len(shards)): MemorySource(tensors) for number, tensors in enumerate(shards, 1)
    }
    homes = {name: Home(file, name, 0, slot.rows) for file, s in sources.items() for name, slot in s.slots.items()}

    def write_rest(out: Path) -> None:
        model.config.dtype = dtype
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(out)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(out)
        tokenizer.save_pretrained(out)

    return _Base({"model": model}, sources, {"model": homes}, write_rest)


def _changes(base: _Base, adapters: Sequence[tuple[Path, float]]) -> dict[Home, Change]:
    """What all adapters do together, by place."""
    found: dict[tuple[str, str], list[tuple[Delta, float]]] = {}
    for path, weight in adapters:
        for component, deltas in read_adapter(path, base.models).components.items():
            for module, delta in deltas.items():
                found.setdefault((component, _bare(component, module)), []).append((delta, weight))
    changes = {}
    for (component, module), terms in found.items():
        home = base.homes[component].get(f"{module}.weight")
        tied = getattr(getattr(base.models[component], "config", None), "tie_word_embeddings", False)
        if home is None or (tied and module == "lm_head"):
            raise ModelError("the base has no weight of its own there", where=module)
        slot = base.sources[home.file].slots[home.name]
        if slot.dtype not in FLOATS:
            raise ModelError(f"the base's weight is {slot.dtype}: nothing can be added to it", where=home.name)
        change = Change(terms)
        if change.shape != (home.last - home.first, slot.columns):
            shape = (home.last - home.first, *slot.shape[1:])
            raise ModelError(f"the adapter is for {change.shape}, the base's file has {shape}", where=home.name)
        changes[home] = change
    return changes


def _converted(slot: Slot, dtype: torch.dtype | None) -> Slot:
    return slot._replace(dtype=dtype) if dtype is not None and slot.dtype in FLOATS else slot


def _same_layout(base: _Base, changes: Mapping[Home, Change], dtype: torch.dtype | None) -> dict[str, OutFile]:
    """The base's own files, tensor for tensor."""
    changed: dict[tuple[str, str], list[Home]] = {}
    for home in sorted(changes):
        changed.setdefault((home.file, home.name), []).append(home)
    files = {}
    for file, source in base.sources.items():
        tensors = {}
        for name, slot in source.slots.items():
            homes = changed.get((file, name), [])
            cuts = sorted({0, slot.rows, *(row for home in homes for row in (home.first, home.last))})
            spans = [Home(file, name, first, last) for first, last in pairwise(cuts)] or [Home(file, name, 0, 0)]
            pieces = tuple(Piece(source, name, span.first, span.last, changes.get(span)) for span in spans)
            tensors[name] = Target(_converted(slot, dtype), pieces)
        files[file] = OutFile(tensors, source.metadata)
    return files


def _unpacked(base: _Base, changes: Mapping[Home, Change], dtype: torch.dtype | None) -> dict[str, OutFile]:
    """A single file's components as a diffusers folder's files."""
    files = {}
    for component, model in base.models.items():
        tensors = {}
        for name, tensor in model.state_dict().items():
            home = base.homes[component][name]
            source = base.sources[home.file]
            slot = _converted(Slot(source.slots[home.name].dtype, tuple(tensor.shape)), dtype)
            tensors[name] = Target(slot, (Piece(source, home.name, home.first, home.last, changes.get(home)),))
        files[f"{component}/{checks.WEIGHTS[component]}.safetensors"] = OutFile(tensors, {"format": "pt"})
    return files


def write_rest(plan: MergePlan, folder: Path) -> None:
    """Everything of a merged folder but the weights themselves."""
    plan.write_rest(folder)
    write_indexes(folder, plan.files)

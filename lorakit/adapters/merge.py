"""An adapter added to its base for good: W + scale * B A in float32, rounded once, written tensor by tensor.

The result is a folder that plain transformers or diffusers loads. Tensors that the adapter does not touch keep their
bytes, shards and index keep their layout, configs and tokenizer come along.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakit.adapters.delta import Delta, merged
from lorakit.adapters.files import read_adapter
from lorakit.adapters.skeleton import load_gguf, skeleton
from lorakit.adapters.stream import FLOATS, FileSource, MemorySource, Slot, Source, write_stream
from lorakit.errors import ConflictError, ModelError, ResourceError
from lorakit.storage import checks
from lorakit.storage.atomic import new_folder
from lorakit.storage.bases import BaseLocation, resolve

LOG = logging.getLogger("lorakit")
Progress = Callable[[int, int], None]
SHARD = 5_000_000_000
"""Bytes of a shard when a GGUF file becomes a folder."""
_LEFT_BEHIND = {*checks.PICKLES, ".safetensors", ".py", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    out: Path
    modules: int
    """Weights that the adapter changed."""
    bytes: int
    """Size of the weight files written."""
    dtype: str
    """Of the changed weights: ``float16``, or several with commas."""
    rounding: float
    """Largest absolute difference between a float32 sum and what was written."""
    lost: float
    """Share of the change that rounding took: norm(written - sum) / norm(sum - W), over all changed weights."""


class _Tally:
    """Running totals over the changed weights, and the progress in bytes."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.dtypes: set[str] = set()
        self.modules, self.rounding, self.error, self.change = 0, 0.0, 0.0, 0.0
        self._done, self._total, self._progress = 0, total, progress

    def weight(self, before: Tensor, total: Tensor, after: Tensor) -> None:
        difference = after.float() - total
        self.modules += 1
        self.dtypes.add(str(after.dtype).removeprefix("torch."))
        self.rounding = max(self.rounding, difference.abs().max().item())
        self.error += difference.double().square().sum().item()
        self.change += (total - before.float()).double().square().sum().item()

    def written(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


@dataclass(frozen=True)
class _Part:
    """One component of the base: its sources by file name, and the changes by tensor name."""

    folder: str
    sources: dict[str, Source]
    changes: dict[str, Delta]


def merge(
    base: BaseLocation,
    adapter: Path,
    out: Path,
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write ``base`` with ``adapter`` added ``scale`` times into the folder ``out``.

    ``dtype`` (float32, float16, bfloat16) converts all floats; without it each tensor keeps its own, and a GGUF base,
    whose weights are de-quantized, becomes float16. ``progress`` gets bytes written and bytes in all.
    ``out`` is absent or complete whatever happens. A single-file base has to be a folder first.

    Raises ConflictError when ``out`` exists (unless ``overwrite``), or is the base or the adapter; ResourceError when
    the space does not suffice; ModelError when the adapter does not fit, or a sum is not finite in its dtype.
    """
    _check_out(base.path, adapter, out, overwrite)
    if base.layout == "single-file":
        raise ModelError("a single file is merged from its diffusers folder", where=base.name)
    parts, write_rest = _gguf_parts(base, adapter) if base.layout == "gguf" else _folder_parts(base, adapter)
    if base.layout == "gguf" and dtype is None:
        dtype = torch.float16
    slots = {
        (part.folder, file): _target_slots(source, dtype) for part in parts for file, source in part.sources.items()
    }
    total = sum(slot.bytes for table in slots.values() for slot in table.values())
    _check_space(out, total)
    tally = _Tally(total, progress)
    with new_folder(out, manifest=False, replace=overwrite) as folder:
        write_rest(folder, dtype)
        for part in parts:
            (folder / part.folder).mkdir(exist_ok=True)
            for file, source in part.sources.items():
                target = folder / part.folder / file
                _write(target, source, slots[part.folder, file], part.changes, scale, tally)
            _write_index(folder / part.folder, {file: slots[part.folder, file] for file in part.sources})
        resolve(str(folder))
    lost = (tally.error / tally.change) ** 0.5 if tally.change else 0.0
    return MergeReport(out, tally.modules, total, ", ".join(sorted(tally.dtypes)), tally.rounding, lost)


def _check_out(base: Path, adapter: Path, out: Path, overwrite: bool) -> None:
    target = out.resolve()
    for name, path in (("base", base.resolve()), ("adapter", adapter.resolve())):
        if target == path or target in path.parents or path in target.parents:
            raise ConflictError(f"OUT is the {name}, or inside it, or around it", where=str(out))
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise ConflictError("exists already", where=str(out), hint="choose another name, or --overwrite")
    kinds = ("config.json", "model_index.json")
    if out.is_symlink() or not out.is_dir() or (any(out.iterdir()) and not any((out / k).is_file() for k in kinds)):
        raise ConflictError("not a model's folder: it is not replaced", where=str(out))


def _check_space(out: Path, total: int) -> None:
    parent = next(path for path in out.resolve().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < total + 50_000_000:
        raise ResourceError(
            f"the merged model takes {total / 1e9:.2f} GB, {free / 1e9:.2f} GB are free", where=str(parent)
        )


def _folder_parts(base: BaseLocation, adapter: Path) -> tuple[list[_Part], Callable[[Path, torch.dtype | None], None]]:
    models = skeleton(base)
    saved = read_adapter(adapter, models)
    names = {"model": ""} if base.layout == "transformers" else {name: name for name in checks.WEIGHTS}
    parts = []
    for component, folder in names.items():
        stem = checks.WEIGHTS.get(component, "model")
        files = {file.name: FileSource(file) for file in checks.shard_files(base.path / folder, stem)}
        deltas = saved.components.get(component, {})
        sources: dict[str, Source] = dict(files)
        parts.append(_Part(folder, sources, _tensor_names(deltas, sources, models.get(component))))
    return parts, lambda out, dtype: _copy_rest(base, out, dtype)


def _gguf_parts(base: BaseLocation, adapter: Path) -> tuple[list[_Part], Callable[[Path, torch.dtype | None], None]]:
    model, tokenizer = load_gguf(base)
    saved = read_adapter(adapter, {"model": model})
    shards: list[dict[str, Tensor]] = [{}]
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
    part = _Part("", sources, _tensor_names(saved.components["model"], sources, model))

    def write_rest(out: Path, dtype: torch.dtype | None) -> None:
        model.config.dtype = dtype
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(out)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(out)
        tokenizer.save_pretrained(out)

    return [part], write_rest


def _tensor_names(
    deltas: Mapping[str, Delta], sources: Mapping[str, Source], model: nn.Module | None
) -> dict[str, Delta]:
    """The changes by the weights' names in the files, which may have CLIP's old ``text_model.`` in front."""
    bare = {name.removeprefix("text_model."): name for source in sources.values() for name in source.slots}
    slots = {name: slot for source in sources.values() for name, slot in source.slots.items()}
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    changes = {}
    for path, delta in deltas.items():
        name = bare.get(f"{path.removeprefix('text_model.')}.weight")
        if name is None or (tied and path == "lm_head"):
            raise ModelError("the base has no weight of its own there", where=path)
        if slots[name].dtype not in FLOATS:
            raise ModelError(f"the base's weight is {slots[name].dtype}: nothing can be added to it", where=name)
        changes[name] = delta
    return changes


def _target_slots(source: Source, dtype: torch.dtype | None) -> dict[str, Slot]:
    return {
        name: slot._replace(dtype=dtype) if dtype is not None and slot.dtype in FLOATS else slot
        for name, slot in source.slots.items()
    }


def _write(
    path: Path, source: Source, slots: Mapping[str, Slot], changes: Mapping[str, Delta], scale: float, tally: _Tally
) -> None:
    def tensor(name: str) -> Tensor:
        before, target = source.read(name), slots[name].dtype
        if name in changes:
            total = merged(before, changes[name], scale)
            after = total.to(target)
            tally.weight(before, total, after)
        else:
            after = before.to(target)
        if (name in changes or target != before.dtype) and not torch.isfinite(after).all():
            raise ModelError(f"not finite in {target}: it overflows, or was not finite before", where=name)
        tally.written(slots[name].bytes)
        return after

    with torch.no_grad():
        write_stream(path, slots, source.metadata, tensor)


def _write_index(folder: Path, files: Mapping[str, Mapping[str, Slot]]) -> None:
    if len(files) == 1 and "-of-" not in next(iter(files)):
        return
    total = sum(slot.bytes for slots in files.values() for slot in slots.values())
    weight_map = {name: file for file, slots in files.items() for name in slots}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    stem = next(iter(files)).split("-")[0]
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _rest(folder: Path) -> Iterator[Path]:
    """Files that come along: configs, tokenizer, licence; no weights of any kind, no code."""
    for path in sorted(folder.iterdir()):
        hidden, index = path.name.startswith("."), path.name.endswith(".index.json")
        if path.is_file() and path.suffix not in _LEFT_BEHIND and not hidden and not index:
            yield path


def _copy_rest(base: BaseLocation, out: Path, dtype: torch.dtype | None) -> None:
    for path in _rest(base.path):
        shutil.copyfile(path, out / path.name)
    if base.layout == "transformers":
        _set_dtype(out / "config.json", dtype)
        return
    index_path = out / "model_index.json"
    index = checks.read_json(index_path)
    for component in [name for name, pair in index.items() if isinstance(pair, list) and pair != [None, None]]:
        source = base.path / component
        optional = component in ("safety_checker", "image_encoder")
        complete = source.is_dir() and (not optional or (source / "model.safetensors").is_file())
        if not complete:
            LOG.warning("%s: no %s to carry along; the merged model goes without", base.name, component)
            index[component] = [None, None]
            continue
        (out / component).mkdir()
        for path in _rest(source):
            shutil.copyfile(path, out / component / path.name)
        if optional:
            shutil.copyfile(source / "model.safetensors", out / component / "model.safetensors")
        elif component == "text_encoder":
            _set_dtype(out / component / "config.json", dtype)
    if index.get("safety_checker") == [None, None]:
        index["requires_safety_checker"] = False
    index_path.write_text(json.dumps(index, indent=2) + "\n")


def _set_dtype(path: Path, dtype: torch.dtype | None) -> None:
    if dtype is None:
        return
    config = checks.read_json(path)
    for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
        config[key] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

"""What a merged model's folder holds beside its weights: configs, tokenizer and licence of the base, and the index."""

import json
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lorakit.adapters.merging.stream import OutFile
from lorakit.storage import checks
from lorakit.storage.bases import BaseLocation

LOG = logging.getLogger("lorakit")
_LEFT_BEHIND = {*checks.PICKLES, ".safetensors", ".py", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}


def copy_rest(base: BaseLocation, out: Path, config: Mapping[str, Any]) -> None:
    """Copy what a base's folder holds beside its weights; the language model's config gets the values of ``config``
    and no longer tells of weights in 4 bits."""
    for path in _rest(base.path):
        shutil.copyfile(path, out / path.name)
    if base.layout == "transformers":
        templates = base.path / "additional_chat_templates"
        if templates.is_dir():
            (out / templates.name).mkdir()
            for path in _rest(templates):
                shutil.copyfile(path, out / templates.name / path.name)
        _set(out / "config.json", config)
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
        elif component.startswith("text_encoder"):
            _set(out / component / "config.json", config)
    if index.get("safety_checker") == [None, None]:
        index["requires_safety_checker"] = False
    index_path.write_text(json.dumps(index, indent=2) + "\n")


def _rest(folder: Path) -> Iterator[Path]:
    """Files that come along: configs, tokenizer, licence; no weights of any kind, no code."""
    for path in sorted(folder.iterdir()):
        hidden, index = path.name.startswith("."), path.name.endswith(".index.json")
        if path.is_file() and path.suffix not in _LEFT_BEHIND and not hidden and not index:
            yield path


def _set(path: Path, values: Mapping[str, Any]) -> None:
    config = checks.read_json(path)
    quantized = config.pop("quantization_config", None)
    if not values and quantized is None:
        return
    for key, value in values.items():
        names = {"dtype", "torch_dtype"} & config.keys() or {"dtype"} if key == "dtype" else {key}
        config |= dict.fromkeys(names, str(value).removeprefix("torch.") if key == "dtype" else value)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_indexes(out: Path, files: Mapping[str, OutFile], base: Path, *, untied: bool) -> None:
    """Write the index of every sharded component, with the right total size, and what else the index in ``base`` says
    of the whole; but for the count of parameters, when the head has become one of them."""
    shards: dict[Path, dict[str, OutFile]] = {}
    for name, file in files.items():
        unnumbered = (out / name).parent == out and name != "model.safetensors"
        if "-of-" in name or unnumbered:
            shards.setdefault((out / name).parent, {})[Path(name).name] = file
    for folder, members in shards.items():
        weight_map = {name: shard for shard, file in members.items() for name in file.tensors}
        stem = "model" if folder == out else next(iter(members)).split("-")[0]
        path = folder / f"{stem}.safetensors.index.json"
        told = _said(base / path.relative_to(out), {"total_parameters"} if untied else set())
        told["total_size"] = sum(file.size for file in members.values())
        index = {"metadata": told, "weight_map": dict(sorted(weight_map.items()))}
        path.write_text(json.dumps(index, indent=2) + "\n")


def _said(index: Path, untrue: Collection[str]) -> dict[str, Any]:
    """An index's metadata, if there is one and it has any, without those that are ``untrue`` by now."""
    told = checks.read_json(index).get("metadata") if index.is_file() else None
    return {key: value for key, value in told.items() if key not in untrue} if isinstance(told, dict) else {}

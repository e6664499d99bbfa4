"""Adapters on disk: PEFT folders, kohya files and diffusers files, read into one form.

Only safetensors and JSON are opened. A tensor that is left over, missing, misshapen or not finite is an error that
names it, and a base that an adapter's configuration names is never loaded for it.
"""

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lorakit.adapters import formats
from lorakit.adapters.delta import Delta, SavedAdapter
from lorakit.adapters.targets import adaptable, fit
from lorakit.errors import ModelError
from lorakit.storage.checks import PICKLES, read_json
from lorakit.storage.headers import read_header

LOG = logging.getLogger("lorakit")
WEIGHTS = "adapter_model.safetensors"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_NOT_SUPPORTED = (
    "modules_to_save", "fan_in_fan_out", "layer_replication", "lora_bias", "target_parameters", "megatron_config",
    "trainable_token_indices", "alora_invocation_tokens", "use_qalora", "arrow_config", "kasa_config", "use_bdlora",
)  # fmt: skip
"""Fields of a PEFT configuration that change what the tensors mean."""


def read_adapter(path: Path, models: Mapping[str, nn.Module] | None = None) -> SavedAdapter:
    """An adapter from a PEFT folder (or a run folder with one), a kohya file, or a diffusers file.

    ``models`` are the base's components by name (``model``; ``unet``, ``text_encoder``), on meta if need be. With
    them every module and shape is compared, and paths are the models' own; kohya's flat names need them.

    Raises ModelError naming the file and the key.
    """
    try:
        saved = _read_folder(path, models) if path.is_dir() else _read_file(path, models)
        return saved if models is None else _fitted(saved, models)
    except ModelError as error:
        inside = error.where if error.where.startswith(str(path)) else f"{path}: {error.where}".removesuffix(": ")
        raise ModelError(error.reason, where=inside, hint=error.hint) from error


def _read_folder(path: Path, models: Mapping[str, nn.Module] | None) -> SavedAdapter:
    if not (path / "adapter_config.json").is_file() and (path / "adapter").is_dir():
        path = path / "adapter"
    if (path / "pytorch_lora_weights.safetensors").is_file():
        return _read_file(path / "pytorch_lora_weights.safetensors", models)
    parts = {name: path / name for name in ("unet", "text_encoder") if (path / name).is_dir()} or {"model": path}
    components: dict[str, dict[str, Delta]] = {}
    metadata: dict[str, str] = {}
    for component, folder in parts.items():
        if not (folder / "adapter_config.json").is_file():
            raise ModelError("no adapter_config.json: not an adapter's folder", where=str(folder))
        if not (folder / WEIGHTS).is_file():
            pickles = [file.name for file in folder.iterdir() if file.suffix in PICKLES]
            reason = f"only {pickles[0]}, a pickle, which is never opened" if pickles else f"no {WEIGHTS}"
            raise ModelError(reason, where=str(folder))
        config = read_json(folder / "adapter_config.json")
        _check_config(config)
        tensors, found = _tensors(folder / WEIGHTS)
        if (form := formats.detect(tensors)) != "peft":
            raise ModelError(f"{form} keys in a PEFT folder", where=str(folder / WEIGHTS))
        keys = {key: formats.split(key, "peft", component) for key in tensors}
        components[component] = _deltas(keys, tensors, config)
        if models is not None and component in models:
            _check_targets(config, models[component], components[component])
        metadata |= found
        metadata["base_model_name_or_path"] = str(config.get("base_model_name_or_path") or "")
    return SavedAdapter("llama" if "model" in components else "sd", components, "peft", metadata)


def _read_file(path: Path, models: Mapping[str, nn.Module] | None) -> SavedAdapter:
    if path.suffix in PICKLES:
        raise ModelError("a pickle, which is never opened", hint="convert it to safetensors")
    tensors, metadata = _tensors(path)
    form = formats.detect(tensors)
    if form == "peft":
        raise ModelError("PEFT's weights without their adapter_config.json", hint="give the folder that holds both")
    keys = {key: formats.split(key, form) for key in tensors}
    if form == "kohya":
        if models is None:
            raise ModelError("flat names can only be read against a base")
        table = formats.kohya_table({name: adaptable(model) for name, model in models.items()})
        keys = {key: part._replace(module=formats.flat_path(part.module, table)) for key, part in keys.items()}
    config = json.loads(metadata["lora_adapter_metadata"]) if "lora_adapter_metadata" in metadata else None
    components = {}
    for component in dict.fromkeys(part.component for part in keys.values()):
        own = {key: part for key, part in keys.items() if part.component == component}
        prefix = f"{component}."
        part_config = config and {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
        components[component] = _deltas(own, tensors, part_config or None)
        alphas = sum(part.part == "alpha" for part in own.values())
        if not part_config and alphas < len(components[component]):
            count = len(components[component]) - alphas
            LOG.warning("%s: no alpha for %d modules of %s; alpha = rank is taken", path, count, component)
    return SavedAdapter("sd", components, form, metadata)


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a checked file, and its metadata; ModelError for a dtype that is no float, NaN or infinity."""
    header = read_header(path)
    tensors = {}
    with safe_open(path, framework="pt") as file:
        for name, info in header.tensors.items():
            if info.dtype not in _FLOATS:
                raise ModelError(f"dtype {info.dtype}, not a float", where=name)
            tensors[name] = file.get_tensor(name)
            if not torch.isfinite(tensors[name]).all():
                raise ModelError("NaN or infinity", where=name)
    return tensors, header.metadata


def _check_config(config: Mapping[str, Any]) -> None:
    where = "adapter_config.json"
    if config.get("peft_type") != "LORA":
        raise ModelError(f"peft_type is {config.get('peft_type')!r}, not LORA", where=where)
    for key in _NOT_SUPPORTED:
        if config.get(key):
            raise ModelError(f"{key} is not supported", where=where)
    if config.get("bias", "none") != "none":
        raise ModelError("trained biases are not supported", where=where)


def _number(config: Mapping[str, Any], field: str, path: str) -> float:
    """``r`` or ``lora_alpha`` of a module: its pattern's, which is a regular expression, or the general one."""
    table = config.get("rank_pattern" if field == "r" else "alpha_pattern") or {}
    for pattern, value in table.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return float(value)
    if not isinstance(config.get(field), int | float) or not config[field] > 0:
        raise ModelError(f"{field} is {config.get(field)!r}, not a positive number", where="adapter_config.json")
    return float(config[field])


def _deltas(
    keys: Mapping[str, formats.Key], tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> dict[str, Delta]:
    """A component's changes; ``config`` is PEFT's, without it alpha tensors count, and alpha = rank without those."""
    modules: dict[str, dict[formats.Part, str]] = {}
    for key, part in keys.items():
        if part.part in modules.setdefault(part.module, {}):
            raise ModelError(f"says the same as {modules[part.module][part.part]}", where=key)
        modules[part.module][part.part] = key
    return {module: _delta(module, parts, tensors, config) for module, parts in modules.items()}


def _delta(
    module: str, parts: Mapping[formats.Part, str], tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> Delta:
    for part, other in (("A", "B"), ("B", "A")):
        if part not in parts:
            raise ModelError(f"its {part} is missing", where=parts.get(other, module))  # type: ignore[call-overload]
    a, b = tensors[parts["A"]], tensors[parts["B"]]
    rank = a.shape[0] if a.dim() else 0
    if a.dim() not in (2, 4) or b.dim() not in (2, 4) or b.shape[1] != rank or b.shape[2:].numel() != 1:
        raise ModelError(f"A {tuple(a.shape)} and B {tuple(b.shape)} do not multiply", where=parts["A"])
    if not 0 < rank <= min(a[0].numel(), b.shape[0]):
        raise ModelError(f"rank {rank} with A {tuple(a.shape)} and B {tuple(b.shape)}", where=parts["A"])
    scale = 1.0
    if config is not None:
        if _number(config, "r", module) != rank:
            raise ModelError(f"rank {rank}, but the configuration says otherwise", where=parts["A"])
        scale = _number(config, "lora_alpha", module) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    elif "alpha" in parts:
        alpha = tensors[parts["alpha"]]
        if alpha.numel() != 1:
            raise ModelError(f"alpha has shape {tuple(alpha.shape)}", where=parts["alpha"])
        scale = alpha.item() / rank
    magnitude = tensors[parts["magnitude"]] if "magnitude" in parts else None
    if magnitude is not None:
        outer = magnitude.shape[1] if magnitude.dim() == 4 and magnitude.shape[0] == 1 else magnitude.shape[0]
        if magnitude.numel() != b.shape[0] or outer != b.shape[0]:
            raise ModelError(
                f"magnitudes {tuple(magnitude.shape)} for {b.shape[0]} outputs: only DoRA on the output is supported",
                where=parts["magnitude"],
            )
        magnitude = magnitude.flatten()
    elif config is not None and config.get("use_dora"):
        raise ModelError("its DoRA magnitude is missing", where=parts["A"])
    return Delta(a, b, scale, magnitude)


def _check_targets(config: Mapping[str, Any], model: nn.Module, found: Iterable[str]) -> None:
    """A layer that PEFT's configuration targets but the file has no tensors for is an error."""
    targets = config.get("target_modules")
    if not targets or any(config.get(key) for key in ("layers_to_transform", "exclude_modules")):
        return
    bare = {name.removeprefix("text_model.") for name in found}
    for name in adaptable(model):
        if isinstance(targets, str):
            wanted = targets != "all-linear" and re.fullmatch(targets, name) is not None
        else:
            wanted = name in targets or name.endswith(tuple(f".{target}" for target in targets))
        if wanted and name.removeprefix("text_model.") not in bare:
            raise ModelError("the configuration targets it, the weights do not have it", where=name)


def _fitted(saved: SavedAdapter, models: Mapping[str, nn.Module]) -> SavedAdapter:
    """The same with the models' own paths, and 1x1 convolutions and linear layers told apart by the model."""
    components = {}
    for component, deltas in saved.components.items():
        if component not in models:
            raise ModelError(f"made for a {component}, which the base has not")
        layers = adaptable(models[component])
        bare = {name.removeprefix("text_model."): layer for name, layer in layers.items()}
        shaped = {}
        for path, delta in deltas.items():
            layer, a, b = bare.get(path.removeprefix("text_model.")), delta.A, delta.B
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and a.dim() == 2:
                a, b = a[:, :, None, None], b.reshape(*b.shape[:2], 1, 1)
            elif isinstance(layer, nn.Linear) and a.dim() == 4 and a.shape[2:] == (1, 1):
                a, b = a.flatten(1), b.flatten(1)
            shaped[path] = Delta(a, b, delta.scale, delta.magnitude)
        paths = fit(models[component], shaped)
        components[component] = {paths[path]: delta for path, delta in shaped.items()}
    return SavedAdapter(saved.family, components, saved.format, saved.metadata)

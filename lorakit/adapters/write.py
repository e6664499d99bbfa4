"""Adapters written to disk: PEFT's folder, diffusers' file, and kohya's single file that other programs load.

Tensors keep their dtype. Where a format has no room for a module's own scale, the scale goes into B.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lorakit.adapters.delta import Delta, rescaled
from lorakit.adapters.formats import bare, diffusers_name, is_xl, kohya_names
from lorakit.adapters.outline import adaptable
from lorakit.adapters.pieces import CONFIG, PACKED, TEMPLATE, TEMPLATE_KEY, WEIGHTS
from lorakit.adapters.targets import Injection, Target, suffixes
from lorakit.errors import ModelError
from lorakit.recipe.schema import Adapter

log = logging.getLogger("lorakit")


def deltas(state: Mapping[str, Tensor], injection: Injection) -> dict[str, Delta]:
    """The changes of one component, from what ``inject.adapter_state`` and ``inject.inject`` gave."""
    changes = {}
    for target in injection.targets:
        magnitude = state.get(f"{target.name}.lora_magnitude_vector")
        changes[target.name] = Delta(
            state[f"{target.name}.lora_A.weight"],
            state[f"{target.name}.lora_B.weight"],
            injection.scale(target),
            None if magnitude is None else magnitude.flatten(),
        )
    return changes


def taken_apart(changes: Mapping[str, Delta], model: nn.Module | None) -> tuple[dict[str, Tensor], Injection]:
    """The inverse of ``deltas``, as far as the changes tell: what ``write_peft`` writes. Scales count as alpha / rank.

    With ``model``, on meta if need be, the targets are named by their ends where these pick out exactly them, and
    changes of embeddings [V, D] are as PEFT has them, A [r, V] and B [D, r].
    """
    state, targets, alphas = {}, [], {}
    for path, delta in ((path, _above_zero(delta)) for path, delta in changes.items()):
        if model is not None and isinstance(model.get_submodule(path), nn.Embedding):
            state[f"{path}.lora_embedding_A"], state[f"{path}.lora_embedding_B"] = delta.B.T, delta.A.T
        else:
            state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"] = delta.A, delta.B
        if delta.magnitude is not None:
            shape = (-1,) if delta.A.dim() == 2 else (1, -1, 1, 1)
            state[f"{path}.lora_magnitude_vector"] = delta.magnitude.reshape(shape)
        targets.append(Target(path, delta.A.shape[1], delta.B.shape[0], delta.rank))
        alphas[path] = _alpha(delta)
    with_dora = {delta.magnitude is not None for delta in changes.values()}
    if len(with_dora) > 1:
        raise ModelError("some modules have DoRA magnitudes and some have not: a PEFT adapter has one kind")
    rank = Counter(target.rank for target in targets).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    adapter = Adapter(rank=rank, alpha=alpha, dora=with_dora.pop())
    ends = tuple(changes) if model is None else suffixes((name for name, _ in model.named_modules()), list(changes))
    return state, Injection(adapter, tuple(targets), alphas, ends)


def _above_zero(delta: Delta) -> Delta:
    """The same change with an alpha above 0, B taking the sign, or the 0: sd-scripts and LyCORIS take the rank for an
    alpha of 0, as llama.cpp takes alpha = rank for it, all others no change."""
    return delta if delta.scale > 0 else rescaled(delta, -delta.scale or 1.0)


def _alpha(delta: Delta) -> float:
    """scale * rank, without the digits that division and multiplication leave behind."""
    alpha = delta.scale * delta.rank
    rounded = (round(alpha, digits) for digits in (0, 3, 6, 9, 12))
    return next((value for value in rounded if value / delta.rank == delta.scale), alpha)


def with_one_alpha(components: Mapping[str, Mapping[str, Delta]]) -> tuple[float, dict[str, dict[str, Delta]]]:
    """The commonest alpha, as the float32 that kohya's and GGUF's files hold, and the same changes with scale
    alpha / rank throughout."""
    everything = [delta for changes in components.values() for delta in changes.values()]
    ((alpha, _),) = Counter(_alpha(_above_zero(delta)) for delta in everything).most_common(1)
    alpha = torch.tensor(alpha, dtype=torch.float32).clamp(torch.finfo(torch.float32).tiny).item()
    return alpha, {
        component: {path: rescaled(delta, alpha / delta.rank) for path, delta in changes.items()}
        for component, changes in components.items()
    }


def _whole(alpha: float) -> int:
    """16.0 as 16, the way PEFT writes it; PEFT takes 0.5 too, whatever its annotation says."""
    return int(alpha) if alpha == int(alpha) else cast(int, alpha)


def _check_finite(state: Mapping[str, Tensor]) -> None:
    for key, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ModelError("NaN or infinity is not written", where=key)


def write_peft(
    folder: Path,
    state: Mapping[str, Tensor],
    injection: Injection,
    *,
    base_name: str,
    task: Literal["CAUSAL_LM"] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one component as PEFT does: ``adapter_config.json`` and ``adapter_model.safetensors``.

    ``state`` is ``adapter_state``'s; ``metadata`` goes into the safetensors header, but for the chat template, which is
    a file. LLaMA's adapter goes directly into its folder with ``task="CAUSAL_LM"``; SD's into one sub-folder a
    component. ModelError for NaN or infinity.
    """
    strings = {"format": "pt", **(metadata or {})}
    template = strings.pop(TEMPLATE_KEY, None)
    _check_finite(state)
    table = peft_config(injection, base_name, task)
    tensors = {f"base_model.model.{key}": tensor.contiguous() for key, tensor in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(save(tensors, strings))
    (folder / CONFIG).write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if template is not None:
        (folder / TEMPLATE).write_text(template, encoding="utf-8")


def peft_config(injection: Injection, base_name: str, task: Literal["CAUSAL_LM"] | None = None) -> dict[str, Any]:
    """The table of adapter_config.json."""
    from lorakit.adapters.peft_lora import LoraConfig, TaskType  # takes seconds, and other formats need none of it

    adapter = injection.adapter
    config = LoraConfig(
        task_type=None if task is None else TaskType(task),
        base_model_name_or_path=base_name,
        inference_mode=True,
        r=adapter.rank,
        lora_alpha=_whole(adapter.lora_alpha),
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        init_lora_weights="gaussian" if adapter.init == "gaussian" else True,
        target_modules=list(injection.suffixes),
        rank_pattern={f"^{t.name}": t.rank for t in injection.targets if t.rank != adapter.rank},
        alpha_pattern={
            f"^{name}": _whole(alpha) for name, alpha in injection.alphas.items() if alpha != adapter.lora_alpha
        },
    )
    table: dict[str, Any] = cast(Any, config).to_dict()
    return table | {key: sorted(value) for key, value in table.items() if isinstance(value, set)}


Version = Literal["sd_v1", "sd_v2", "sdxl_base_v1-0"]
"""Which Stable Diffusion an adapter is for, in kohya's words."""


def version_of(models: Mapping[str, nn.Module]) -> Version:
    """kohya's word for the base with these components."""
    if is_xl({component: adaptable(model) for component, model in models.items()}):
        return "sdxl_base_v1-0"
    unet: Any = models["unet"]
    return "sd_v2" if unet.config.cross_attention_dim == 1024 else "sd_v1"


def base_strings(version: Version, prediction_type: str | None, resolution: int | None) -> dict[str, str]:
    """What kohya's and modelspec's metadata say of the base; nothing of what is None."""
    second = {None: None, "v_prediction": "v2-768-v"}.get(prediction_type, "v2-512")
    kind = {"sd_v1": "v1", "sd_v2": second, "sdxl_base_v1-0": "xl-v1-base"}[version]
    known = {"ss_v2": str(version == "sd_v2"), "ss_base_model_version": version}
    if kind is not None:
        known["modelspec.architecture"] = f"stable-diffusion-{kind}/lora"
    if prediction_type is not None:
        known["modelspec.prediction_type"] = "v" if prediction_type == "v_prediction" else "epsilon"
    if resolution is not None:
        known["modelspec.resolution"] = f"{resolution}x{resolution}"
    return known


def write_kohya(
    path: Path,
    components: Mapping[str, Mapping[str, Delta]],
    *,
    title: str,
    version: Version,
    prediction_type: str | None,
    resolution: int | None,
    models: Mapping[str, nn.Module],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write SD's changes as the one file that A1111, ComfyUI and InvokeAI load.

    ``version``: sd_v2 for a base with the 1024-wide text encoder. ``resolution``: training pixels a side. ``models``:
    the base's components, on meta if need be: SDXL's names count all blocks. One alpha for all modules, the commonest
    one, with what differs taken into ``lora_up``, because diffusers 0.42 drops some modules' own alphas. DoRA's
    magnitudes, of the outputs, are LyCORIS' ``dora_scale``, which is warned of: A1111 (1.10) takes them for those of
    the inputs, ComfyUI divides by the base's norms. ModelError for NaN or infinity.
    """
    names = kohya_names({name: list(adaptable(model)) for name, model in models.items()})
    alpha, even = with_one_alpha(components)
    tensors, ranks = {}, set()
    for component, changes in even.items():
        for module, delta in changes.items():
            name = names[component, module]
            ranks.add(delta.rank)
            tensors[f"{name}.lora_down.weight"] = delta.A.contiguous()
            tensors[f"{name}.lora_up.weight"] = delta.B.contiguous()
            tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
            if delta.magnitude is not None:
                ones = [1] * (delta.A.dim() - 1)
                tensors[f"{name}.dora_scale"] = delta.magnitude.reshape(-1, *ones).contiguous()
    if any(name.endswith(".dora_scale") for name in tensors):
        told = (
            "%s: AUTOMATIC1111 and ComfyUI compute DoRA otherwise than it was trained: for them, merge it with its base"
        )
        log.warning(told, title)
    _check_finite(tensors)
    plain = memoryview(save(tensors))
    size = int.from_bytes(plain[:8], "little")
    listed, body = json.loads(bytes(plain[8 : 8 + size])), plain[8 + size :]
    strings = {
        "format": "pt",
        **(metadata or {}),
        **base_strings(version, prediction_type, resolution),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(float(f"{alpha:.7g}")),
        "ss_network_args": "{}",
        "sshs_model_hash": hashlib.sha256(body).hexdigest(),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    header = json.dumps({"__metadata__": strings, **listed}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.writelines((len(header).to_bytes(8, "little"), header, body))


_EVER = (
    "base_model_name_or_path", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_dora",
    "use_rslora",
)  # fmt: skip
"""Of PEFT's configuration what a file needs: diffusers gives all of it to PEFT's class, and an older one refuses fields
that it does not know."""


def write_diffusers(
    path: Path,
    components: Mapping[str, Mapping[str, Delta]],
    base_name: str,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write SD's changes as diffusers does: ``lora_A`` and ``lora_B`` under ``unet.``, ``text_encoder.`` and so on.

    Such a file has no alphas. Every scale is taken into B, so that readers with and without an eye for the
    configuration in the metadata, which says alpha = rank, agree. ModelError for NaN or infinity.
    """
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for component, changes in components.items():
        even = {module: rescaled(delta, 1.0) for module, delta in changes.items()}
        state, injection = taken_apart({bare(module): d for module, d in even.items()}, None)
        tensors |= {diffusers_name(component, key): tensor.contiguous() for key, tensor in state.items()}
        table = {key: value for key, value in peft_config(injection, base_name).items() if key in _EVER}
        for patterns in ("rank_pattern", "alpha_pattern"):  # text_model. may come in front, so nothing is anchored
            table[patterns] = {module.removeprefix("^"): value for module, value in table[patterns].items()}
        config |= {f"{component}.{key}": value for key, value in table.items()}
    _check_finite(tensors)
    packed = {PACKED: json.dumps(config, indent=2, sort_keys=True)}
    path.write_bytes(save(tensors, {"format": "pt", **(metadata or {}), **packed}))

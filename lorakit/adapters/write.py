"""Adapters written to disk: PEFT's folder, and kohya's single file that other programs load."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, TaskType
from safetensors.torch import save
from torch import Tensor

from lorakit.adapters.delta import Delta
from lorakit.adapters.files import WEIGHTS
from lorakit.adapters.formats import kohya_name
from lorakit.adapters.targets import Injection
from lorakit.errors import ModelError
from lorakit.storage.atomic import write_bytes, write_text


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
    """Write one component as PEFT does: ``adapter_config.json`` and ``adapter_model.safetensors``, float32.

    ``state`` is ``adapter_state``'s, ``metadata`` goes into the safetensors header. LLaMA's adapter goes directly
    into its folder with ``task="CAUSAL_LM"``; SD's into one sub-folder a component. ModelError for NaN or infinity.
    """
    _check_finite(state)
    adapter = injection.adapter
    config = LoraConfig(
        task_type=None if task is None else TaskType(task),
        base_model_name_or_path=base_name,
        inference_mode=True,
        r=adapter.rank,
        lora_alpha=_whole(adapter.alpha),
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        init_lora_weights="gaussian" if adapter.init == "gaussian" else True,
        target_modules=list(injection.suffixes),
        rank_pattern={f"^{t.name}": t.rank for t in injection.targets if t.rank != adapter.rank},
        alpha_pattern={f"^{name}": _whole(alpha) for name, alpha in injection.alphas.items() if alpha != adapter.alpha},
    )
    table: dict[str, Any] = cast(Any, config).to_dict()
    table |= {key: sorted(value) for key, value in table.items() if isinstance(value, set)}
    tensors = {f"base_model.model.{key}": tensor.contiguous() for key, tensor in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / WEIGHTS, save(tensors, {"format": "pt", **(metadata or {})}))
    write_text(folder / "adapter_config.json", json.dumps(table, indent=2, sort_keys=True) + "\n")


def write_kohya(
    path: Path,
    components: Mapping[str, Mapping[str, Delta]],
    *,
    version: Literal["sd_v1", "sd_v2"],
    prediction_type: str,
    resolution: int,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write SD's ``unet`` and ``text_encoder`` changes as the one file that A1111, ComfyUI and InvokeAI load.

    ``version``: sd_v2 for a base with the 1024-wide text encoder. ``resolution``: training pixels a side. The file's
    name is its title. Float32. One alpha for all modules, the commonest scale * rank, with what differs taken into
    ``lora_up``, because diffusers 0.42 drops some modules' own alphas. ModelError for NaN or infinity.
    """
    tensors = {}
    everything = [delta for changes in components.values() for delta in changes.values()]
    ((alpha, _),) = Counter(delta.scale * delta.rank for delta in everything).most_common(1)
    for component, changes in components.items():
        for module, delta in changes.items():
            name = kohya_name(component, module)
            tensors[f"{name}.lora_down.weight"] = delta.A.float().contiguous()
            tensors[f"{name}.lora_up.weight"] = (delta.B.float() * (delta.scale * delta.rank / alpha)).contiguous()
            tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
            if delta.magnitude is not None:
                ones = [1] * (delta.A.dim() - 1)
                tensors[f"{name}.dora_scale"] = delta.magnitude.float().reshape(-1, *ones).contiguous()
    _check_finite(tensors)
    ranks = {delta.rank for delta in everything}
    bare = save(tensors)
    body = bare[8 + int.from_bytes(bare[:8], "little") :]
    kind = "v1" if version == "sd_v1" else "v2-768-v" if prediction_type == "v_prediction" else "v2-512"
    strings = {
        "ss_v2": str(version == "sd_v2"),
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alpha),
        "ss_network_args": "{}",
        "sshs_model_hash": hashlib.sha256(body).hexdigest(),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"stable-diffusion-{kind}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": path.stem,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
        "modelspec.resolution": f"{resolution}x{resolution}",
        "format": "pt",
        **(metadata or {}),
    }
    write_bytes(path, save(tensors, strings))

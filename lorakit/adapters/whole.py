"""What a PEFT file holds beside LoRA of layers: modules trained whole, trained biases, biases of B, single tokens'
embeddings, and LoRA of embeddings."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.adapters.delta import Delta
from lorakit.adapters.formats import bare
from lorakit.errors import ModelError

PREFIX = "base_model.model."
EMBEDDINGS = ("embed_tokens", "lm_head")
"""The modules that PEFT saves whole of its own accord when they get LoRA or the vocabulary grew."""
_TRAINED, _UNTRAINED = ".modules_to_save.", ".original_module."
_BIAS, _TOKENS = ".lora_B.bias", ".token_adapter.trainable_tokens_delta"
_LORA = {".lora_embedding_A": ".lora_B.weight", ".lora_embedding_B": ".lora_A.weight"}


def whole_tensors(keys: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """The base's tensors that PEFT's file replaces, by name, and their keys in the file. A name in ``modules_to_save``
    means, as to PEFT, every module whose path it ends: ``norm`` is every ``input_layernorm`` too.

    Raises ModelError when the configuration promises a module that is not there.
    """
    modules = _names(config.get("modules_to_save") or [])
    biases = config.get("bias", "none") != "none"
    found: dict[str, str] = {}
    for key in keys:
        name = key.removeprefix(PREFIX)
        if name == key or ".lora_" in name or _UNTRAINED in name:
            continue
        inner = _TRAINED in name
        name = name.replace(".base_layer.", ".").replace(_TRAINED, ".")
        module, _, kind = name.rpartition(".")
        if module.endswith(modules) or _ends(module, EMBEDDINGS) or (biases and kind == "bias"):
            found[name] = found.get(name, key) if inner else key
    for module in modules:
        if not any(name.rpartition(".")[0].endswith(module) for name in found):
            raise ModelError(
                f"modules_to_save names {module!r}, the weights do not have it", where="adapter_config.json"
            )
    return found


def second_copies(keys: Iterable[str], whole: Mapping[str, str]) -> set[str]:
    """Keys of what PEFT writes again when it saves the embeddings too: of a module in ``modules_to_save`` its untrained
    self, and the trained one by its inner name, where ``whole`` has it by the outer one, which PEFT loads."""
    found = set()
    for key in keys:
        name = key.removeprefix(PREFIX).replace(_UNTRAINED, ".").replace(_TRAINED, ".")
        if (_UNTRAINED in key or _TRAINED in key) and whole.get(name, key) != key:
            found.add(key)
    return found


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise ModelError("modules_to_save is no list of modules", where="adapter_config.json")
    return tuple(value)


def _ends(path: str, names: tuple[str, ...]) -> bool:
    return path in names or path.endswith(tuple(f".{name}" for name in names))


def embeddings_as_layers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """LoRA of an embedding [V, D], which PEFT keeps as A [r, V] and B [D, r], as LoRA of a layer of that shape; and the
    embeddings' names."""
    found: dict[str, Tensor] = {}
    names = set()
    for key, tensor in tensors.items():
        part = next((part for part in _LORA if key.endswith(part)), None)
        if part is None:
            found[key] = tensor
        else:
            names.add(key.removeprefix(PREFIX).removesuffix(part))
            found[key.removesuffix(part) + _LORA[part]] = tensor.T.contiguous()
    return found, tuple(sorted(names))


class Tokens(NamedTuple):
    """Rows of an embedding (or head) that were trained, and what they became."""

    indices: Tensor
    """int64 [n], each once."""
    values: Tensor
    """[n, D]."""


def take_biases(tensors: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """PEFT's ``lora_bias``: b [out] of W x + b_W + scale (B A x + b), by module; they are taken out of ``tensors``.

    Raises ModelError when there are none although the configuration says so, or the other way round.
    """
    found = {key.removeprefix(PREFIX).removesuffix(_BIAS): tensors.pop(key) for key in _ending(tensors, _BIAS)}
    if bool(found) != bool(config.get("lora_bias")):
        held = "has biases of B" if found else "has none"
        raise ModelError(f"lora_bias is {config.get('lora_bias')!r}, the file {held}", where="adapter_config.json")
    return found


def added_biases(biases: Mapping[str, Tensor], deltas: Mapping[str, Delta]) -> dict[str, Delta]:
    """What biases of B add to the layers' own, scale * b, as changes of [out, 1] matrices by tensor name.

    ``deltas`` are the same adapter's, under the base's paths.
    """
    paths = {bare(path): path for path in deltas}
    found = {}
    for module, bias in biases.items():
        path = paths[bare(module)]
        if bias.shape != (deltas[path].B.shape[0],):
            raise ModelError(f"a bias {tuple(bias.shape)} for {deltas[path].B.shape[0]} outputs", where=module)
        found[f"{path}.bias"] = Delta(torch.ones(1, 1, dtype=bias.dtype), bias[:, None], deltas[path].scale)
    return found


def take_tokens(tensors: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tokens]:
    """PEFT's ``trainable_token_indices`` by module; they are taken out of ``tensors``.

    Raises ModelError when tensors and configuration do not agree, but for a tied head, which PEFT does not write.
    """
    told = config.get("trainable_token_indices") or {}
    found = {}
    for key in _ending(tensors, _TOKENS):
        module, values = key.removeprefix(PREFIX).removesuffix(_TOKENS), tensors.pop(key)
        fitting = [name for name in told if _ends(module, (name,))] if isinstance(told, dict) else []
        indices = told[fitting[0]] if fitting else told
        if not isinstance(indices, list) or not all(type(n) is int and 0 <= n < 2**31 for n in indices):
            raise ModelError("no list of its tokens in trainable_token_indices", where=module)
        if values.dim() != 2 or len(indices) != len(set(indices)) or len(indices) != len(values):
            shape = tuple(values.shape)
            raise ModelError(f"{len(set(indices))} tokens in the configuration, the weights are {shape}", where=module)
        found[module] = Tokens(torch.tensor(indices), values)
    for name in told if isinstance(told, dict) else ([""] if told else []):
        if not any(_ends(module, (name,)) or not name for module in found) and not (
            found and _ends(name, ("lm_head",))
        ):
            raise ModelError("trainable_token_indices, but no such tokens in the weights", where=name or "the file")
    return found


def _ending(tensors: Mapping[str, Tensor], suffix: str) -> list[str]:
    return [key for key in tensors if key.endswith(suffix)]

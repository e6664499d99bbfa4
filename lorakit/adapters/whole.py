"""What a PEFT file holds beside LoRA of layers: modules trained whole, trained biases, and LoRA of embeddings."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lorakit.errors import ModelError

PREFIX = "base_model.model."
_EMBEDDINGS = ("embed_tokens", "lm_head")
"""The modules that PEFT saves whole of its own accord when they get LoRA or the vocabulary grew."""
_LORA = {".lora_embedding_A": ".lora_B.weight", ".lora_embedding_B": ".lora_A.weight"}


def whole_tensors(keys: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """The base's tensors that PEFT's file replaces, by name, and their keys in the file.

    Raises ModelError when the configuration promises a module that is not there.
    """
    modules = tuple(config.get("modules_to_save") or ())
    biases = config.get("bias", "none") != "none"
    found = {}
    for key in keys:
        name = key.removeprefix(PREFIX)
        if name == key or ".lora_" in name:
            continue
        name = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        module, _, kind = name.rpartition(".")
        if _ends(module, (*modules, *_EMBEDDINGS)) or (biases and kind == "bias"):
            found[name] = key
    for module in modules:
        if not any(_ends(name.rpartition(".")[0], (module,)) for name in found):
            raise ModelError(
                f"modules_to_save names {module!r}, the weights do not have it", where="adapter_config.json"
            )
    return found


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

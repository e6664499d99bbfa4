"""LoRA for a LLaMA-type model in GGUF, as llama.cpp and ollama load it (``--lora``, ``ADAPTER``).

llama.cpp keeps the rows of q and k of a LLaMA or Mistral in another order, rotary pairs side by side instead of half a
head apart; the rows of their ``lora_b`` go along. One alpha holds for all modules: scale = alpha / rank. For the
embedding [V, D] it looks up rows of a [V, r], which b [D, r] multiplies.
"""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from lorakit.adapters.delta import Delta
from lorakit.adapters.outline import adaptable
from lorakit.errors import ModelError
from lorakit.storage.gguf_header import Items, read_gguf

_ARCHITECTURES = {
    "llama": (gguf.MODEL_ARCH.LLAMA, True),
    "mistral": (gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, False),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, False),
}
"""By transformers' model_type: GGUF's architecture, and whether q and k are permuted."""
ALPHA = gguf.Keys.Adapter.LORA_ALPHA
EMBEDDING = "token_embd"
_DTYPES = {"F32": "<f4", "F16": "<f2"}
_PACKED = ("BF16", "Q8_0")
"""What llama.cpp's own converter writes besides."""
_TIED = {
    "output": "so that its GGUF file has no tensor of that name",
    EMBEDDING: "and llama.cpp does not tell them apart",
}
"""Why the tensors of a base whose head and embedding are one have no LoRA in GGUF."""


@dataclass(frozen=True)
class _Layout:
    """A base as GGUF sees it."""

    architecture: str
    names: dict[str, str]
    """GGUF name of each module path, both without ``.weight``."""
    heads: dict[str, int]
    """By GGUF name, for the weights whose rows are permuted."""


def _layout(model: nn.Module) -> _Layout:
    config: Any = model.config
    if config.model_type not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ModelError(f"GGUF adapters are written for {known}, not for {config.model_type!r}")
    architecture, permuted = _ARCHITECTURES[config.model_type]
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    embeddings = [path for path, module in model.named_modules() if isinstance(module, nn.Embedding)]
    names = {path: name for path in (*adaptable(model), *embeddings) if (name := table.get_name(path)) is not None}
    counts = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    heads = {name: counts[end] for name in names.values() if permuted and (end := name.split(".")[-1]) in counts}
    return _Layout(gguf.MODEL_ARCH_NAMES[architecture], names, heads)


def _interleave(b: Tensor, heads: int) -> Tensor:
    """Rows of [out, r] from halves of a head (transformers) to pairs (llama.cpp)."""
    return b.reshape(heads, 2, b.shape[0] // heads // 2, -1).transpose(1, 2).reshape(b.shape)


def _halve(b: Tensor, heads: int) -> Tensor:
    """The inverse of ``_interleave``."""
    return b.reshape(heads, b.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(b.shape)


def write(
    path: Path, deltas: Mapping[str, Delta], model: nn.Module, *, alpha: float, metadata: Mapping[str, str]
) -> None:
    """Write the changes of ``model`` (on meta if need be), all of which have scale ``alpha`` / rank.

    Tensors are float32 or float16; ``metadata`` are further strings.
    Raises ModelError for DoRA, for a convolution, and for a layer or an architecture that llama.cpp does not know.
    """
    layout = _layout(model)
    config: Any = model.config
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for module, delta in deltas.items():
        if module not in layout.names:
            raise ModelError("GGUF has no name for it", where=module)
        if layout.names[module] in _TIED and config.tie_word_embeddings:
            reason = f"the base's head is its embedding, {_TIED[layout.names[module]]}"
            raise ModelError(reason, where=module, hint="merge it into its base instead")
        if delta.magnitude is not None:
            raise ModelError("llama.cpp's adapters have no DoRA", where=module, hint="merge it into its base instead")
        name = layout.names[module]
        b = _interleave(delta.B, layout.heads[name]) if name in layout.heads else delta.B
        for letter, value in (("a", b), ("b", delta.A.T)) if name == EMBEDDING else (("a", delta.A), ("b", b)):
            tensors[f"{name}.weight.lora_{letter}"] = value.contiguous().numpy()
    writer = gguf.GGUFWriter(path, layout.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(ALPHA, alpha)
    for key, text in metadata.items():
        writer.add_string(key, text)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        # What write_tensors_to_file does, but for numpy's tofile, which loses a full disk's error.
        assert writer.fout is not None
        (file,) = writer.fout
        writer.write_padding(file, file.tell())
        for array in tensors.values():
            file.write(array.tobytes())
            writer.write_padding(file, array.nbytes)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata as strings. Raises ModelError when it is no whole GGUF LoRA."""
    header = read_gguf(path)
    metadata = {key: str(value) for key, value in header.values.items() if not isinstance(value, Items)}
    if metadata.get("general.type") != "adapter" or metadata.get(gguf.Keys.Adapter.TYPE) != "lora":
        raise ModelError("a GGUF file, but not a LoRA", where=str(path))
    for key, kinds in (("general.architecture", str), (ALPHA, int | float)):
        if not isinstance(header.values.get(key, 0.0 if key == ALPHA else None), kinds):
            raise ModelError(f"{key}: missing, or of another kind", where=str(path))
    tensors = {}
    with path.open("rb") as file:
        for name, info in header.tensors.items():
            if info.dtype not in (*_DTYPES, *_PACKED):
                known = ", ".join((*_DTYPES, *_PACKED))
                raise ModelError(f"dtype {info.dtype}: only {known} adapters are read", where=name)
            file.seek(info.begin)
            values = np.frombuffer(file.read(info.end - info.begin), _DTYPES.get(info.dtype, np.uint8))
            if info.dtype in _PACKED:
                values = gguf.quants.dequantize(values, gguf.GGMLQuantizationType[info.dtype])
            tensors[name] = torch.from_numpy(values.reshape(info.shape).copy())
    a, b = (f"{EMBEDDING}.weight.lora_{letter}" for letter in "ab")
    if tensors.keys() >= {a, b}:  # as LoRA of a layer of that shape
        tensors[a], tensors[b] = tensors[b].T.contiguous(), tensors[a]
    return tensors, metadata


def named_by_base(deltas: Mapping[str, Delta], model: nn.Module, architecture: str) -> dict[str, Delta]:
    """The changes of a GGUF adapter by ``model``'s module paths, rows of q and k in transformers' order.

    Raises ModelError when the adapter was made for another architecture or has a module that ``model`` has not.
    """
    layout = _layout(model)
    if architecture != layout.architecture:
        raise ModelError(f"made for the architecture {architecture!r}, the base is {layout.architecture!r}")
    paths = {name: path for path, name in layout.names.items()}
    found = {}
    for name, delta in deltas.items():
        if name not in paths:
            raise ModelError("the base has no such module", where=name)
        # what has not as many rows is refused with all other shapes
        halved = name in layout.heads and len(delta.B) == model.get_submodule(paths[name]).out_features
        b = _halve(delta.B, layout.heads[name]) if halved else delta.B
        found[paths[name]] = Delta(delta.A, b, delta.scale)
    return found

"""What a GGUF file must be before a library builds a model from it: a known architecture, and sizes as its weights.

And what it says of scaled positions, which transformers' reader leaves out.
"""

import math
import struct
from pathlib import Path
from typing import Any

from lorakit.errors import ModelError
from lorakit.storage.gguf_header import GgufHeader, Items, read_gguf

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
EMBEDDING, TOKENS, ROPE = "token_embd.weight", "tokenizer.ggml.tokens", "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of every Llama 3.1, 3.2 and 3.3."""
_NUMBERS = {
    "freq_base", "scale_linear", "scaling.factor", "scaling.original_context_length", "scaling.yarn_beta_fast",
    "scaling.yarn_beta_slow",
}  # fmt: skip


def check_gguf(path: Path) -> dict[str, Any]:
    """A whole GGUF file of a LLaMA-like architecture; how its positions are scaled, as ``rope_parameters`` of
    transformers, empty where they are not. Raises ModelError, with the key that is at fault."""
    header = read_gguf(path)
    try:
        architecture = _architecture(header)
        _check_sizes(header, architecture)
        return _rope_scaling(path, header, architecture)
    except ValueError as error:
        raise ModelError(str(error), where=str(path)) from error


def _rope_scaling(path: Path, header: GgufHeader, architecture: str) -> dict[str, Any]:
    """What transformers calls ``rope_parameters``, beside the base, where positions are scaled; else empty.

    The keys and the tensor are llama.cpp's: linear and YaRN by ``rope.scaling.*``, Llama 3's by what each frequency is
    divided by.
    """
    begin = f"{architecture}.rope."
    told: dict[str, Any] = {key[len(begin) :]: v for key, v in header.values.items() if key.startswith(begin)}
    for key in _NUMBERS & told.keys():
        value, least = told[key], 0.0 if key in ("scaling.factor", "scale_linear") else 1e-9
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _require(begin + key, number and least <= value, f"{str(value)[:40]} is no such number")
    factor = told.get("scaling.factor", told.get("scale_linear", 0.0)) or 1.0
    kind = told.get("scaling.type", "linear")
    if ROPE in header.tensors:
        _require(ROPE, kind in ("linear", "none") and factor == 1.0, f"beside a scaling of {factor}")
        return _llama3(path, header, float(told.get("freq_base", 10000.0)))
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    _require(f"{begin}scaling.type", kind == "yarn", f"{str(kind)[:40]!r} is not known here")
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier"):
        value = told.get(f"scaling.{key}", 1.0)
        _require(f"{begin}scaling.{key}", value == 1.0, f"YaRN with {str(value)[:40]} is not known here")
    context = told.get("scaling.original_context_length", header.values.get(f"{architecture}.context_length"))
    given = {name: told.get(f"scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
    bounds = {name: value for name, value in given.items() if value is not None}
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": context, **bounds}


def _llama3(path: Path, header: GgufHeader, base: float) -> dict[str, Any]:
    """From what the frequencies are divided by: the factor is the largest, all else is the same for every Llama 3."""
    tensor = header.tensors[ROPE]
    (count,) = tensor.shape if len(tensor.shape) == 1 else (0,)
    _require(ROPE, tensor.dtype == "F32" and 0 < count <= 4096, f"{tensor.dtype} {list(tensor.shape)}")
    with path.open("rb") as file:
        file.seek(tensor.begin)
        found = struct.unpack(f"<{count}f", file.read(4 * count))
    low, high, context = LLAMA3.values()
    factor = max(found)
    _require(ROPE, all(1 <= value < math.inf for value in found), "not what frequencies are divided by")
    for number, value in enumerate(found):
        wave = 2 * math.pi * base ** (number / count)
        share = min(max((context / wave - low) / (high - low), 0.0), 1.0)
        expected = 1 / ((1 - share) / factor + share)
        _require(ROPE, math.isclose(value, expected, rel_tol=1e-4), "not Llama 3's scaling, the only one known here")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3} if factor != 1.0 else {}


def _architecture(header: GgufHeader) -> str:
    name = header.values.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"general.architecture is {str(name)[:40]!r}, not one of {', '.join(ARCHITECTURES)}")
    if header.values.get("general.type", "model") != "model":
        raise ValueError(f"general.type is {str(header.values['general.type'])[:40]!r}, not a model")
    return name


def _check_sizes(header: GgufHeader, architecture: str) -> None:
    """Each count that a model is built from, held against the weights: layers, width, pieces of the vocabulary."""
    for key, value in header.values.items():
        if key.startswith((f"{architecture}.", "tokenizer.")) and isinstance(value, int):
            _require(key, -(2**31) <= value < 2**31, f"{value} is too large a number")
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    _require(EMBEDDING, len(shapes.get(EMBEDDING, ())) == 2, "the weights lack it")
    rows, width = shapes[EMBEDDING]
    layers = {name.split(".")[1] for name in shapes if name.startswith("blk.")}
    expected = {"block_count": len(layers), "embedding_length": width}
    if len(up := shapes.get("blk.0.ffn_up.weight", ())) == 2:
        expected["feed_forward_length"] = up[0]
    for end, size in expected.items():
        key = f"{architecture}.{end}"
        _require(key, header.values.get(key) == size, f"it is {header.values.get(key)}, the weights say {size}")
    for end in ("attention.head_count", "attention.head_count_kv", "rope.dimension_count", "context_length"):
        key = f"{architecture}.{end}"
        value = header.values.get(key, 1)
        most = 2**31 if end == "context_length" else width
        _require(key, type(value) is int and 0 < value <= most, f"{str(value)[:40]} is no count")
    _require(f"{architecture}.vocab_size", header.values.get(f"{architecture}.vocab_size", rows) == rows, f"not {rows}")
    tokens = header.values.get(TOKENS)
    _require(TOKENS, isinstance(tokens, Items), "no list")
    _require(TOKENS, isinstance(tokens, Items) and tokens.count <= rows, f"more than the {rows} embeddings")


def _require(key: str, holds: bool, reason: str) -> None:
    if not holds:
        raise ValueError(f"{key}: {reason}")

"""What a GGUF file must be before a library builds a model from it: a known architecture, and sizes as its weights."""

from pathlib import Path

from lorakit.errors import ModelError
from lorakit.storage.gguf_header import GgufHeader, Items, read_gguf

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
EMBEDDING, TOKENS = "token_embd.weight", "tokenizer.ggml.tokens"


def check_gguf(path: Path) -> None:
    """A whole GGUF file of a LLaMA-like architecture. Raises ModelError, with the key that is at fault."""
    header = read_gguf(path)
    try:
        _check_sizes(header, _architecture(header))
    except ValueError as error:
        raise ModelError(str(error), where=str(path)) from error


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
        if key.startswith((f"{architecture}.", "tokenizer.")) and isinstance(value, int | float):
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

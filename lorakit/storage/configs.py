"""The numbers in a model's configuration, held against its weights before anything is built from them.

A library builds what a config says: a count of a billion layers is a billion modules, a table of 10^12 steps that much
memory. Every failure is a ModelError that names the file and the field.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import ModelError

SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window", "projection_dim",
    "cross_attention_dim", "latent_channels", "in_channels", "out_channels",
)  # fmt: skip
LARGEST_SAMPLE = 1024
"""Largest side of a UNet's latents: 8,192 pixels with a VAE of factor 8."""
MOST_TIMESTEPS = 100_000
FOUR_BIT = ".quant_state.bitsandbytes__"
"""In the names of tensors that tell how bitsandbytes stored a weight in 4 bits."""


def check_sizes(config: Mapping[str, Any], path: Path, tensors: int) -> None:
    """Sizes are whole numbers from 1 to 2^31, no whole number is larger, and counts of layers and lists of blocks are
    no longer than the ``tensors`` that the weights have. Exempt are ``max_window_layers``, where small Qwen models keep
    the value of a larger one, and ``rope_theta``, no count: 4.5e10 for four million positions."""
    for key in SIZES:
        value = config.get(key)
        if value is not None and (type(value) is not int or not 0 < value < 2**31):
            raise ModelError(f"{key} is {str(value)[:40]}, not a size", where=str(path))
    for key, value in _numbers(config):
        if isinstance(value, int) and key != "rope_theta" and not -(2**31) <= value < 2**31:
            raise ModelError(f"{key} is {str(value)[:40]}, too large a number", where=str(path))
        if "layers" in key and key != "max_window_layers" and value > tensors:
            raise ModelError(f"{key} is {value}, but the weights are only {tensors} tensors", where=str(path))
    for key, value in config.items():
        if isinstance(value, list) and key != "architectures" and len(value) > max(tensors, 64):
            raise ModelError(f"{key} has {len(value)} items, the weights are {tensors} tensors", where=str(path))


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Every number of a config and of the lists in it, with its key."""
    for key, value in config.items():
        for item in value if isinstance(value, list) else [value]:
            for number in item if isinstance(item, list) else [item]:
                if isinstance(number, int | float) and not isinstance(number, bool):
                    yield key, number


def claimed(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Shapes that a checked config of a language model gives to weights of its first layer, as far as it says them.

    transformers makes room for what a config says even where it finds something else in the file.
    """
    hidden, inner = config["hidden_size"], config.get("intermediate_size")
    shapes: dict[str, tuple[int, int]] = {}
    if inner:
        shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    heads, size = config.get("num_attention_heads"), config.get("head_dim")
    if heads and size:
        shapes |= {"self_attn.q_proj": (heads * size, hidden), "self_attn.o_proj": (hidden, heads * size)}
        if pairs := config.get("num_key_value_heads"):
            shapes |= {"self_attn.k_proj": (pairs * size, hidden), "self_attn.v_proj": (pairs * size, hidden)}
    return {f"model.layers.0.{name}.weight": shape for name, shape in shapes.items()}


def check_quantization(config: Mapping[str, Any], path: Path, *, four_bit: bool) -> None:
    """The weights are not quantized, or with ``four_bit`` at most by bitsandbytes to 4 bits."""
    if "quantization_config" not in config:
        return
    told = config["quantization_config"] if isinstance(config["quantization_config"], dict) else {}
    bits = next((bits for bits in (4, 8) if told.get(f"load_in_{bits}bit") is True), None)
    method = told.get("quant_method", "an unknown method" if bits is None else "bitsandbytes")
    packed = method == "bitsandbytes" and bits == 4
    if packed and four_bit:
        return
    name = f"{method}, {bits} bit" if method == "bitsandbytes" else str(method)[:40]
    hint = "take the original weights"
    hint += ", or bitsandbytes' 4-bit ones" if four_bit else " and set base.quantization, or generate's --quantization"
    if packed:
        hint += "; to merge an adapter, the folder itself may be given"
    raise ModelError(f"the weights are quantized already: {name}", where=str(path), hint=hint)


def check_unet(config: Mapping[str, Any], path: Path) -> None:
    """The latents' size, which the size of pictures follows from."""
    side = config.get("sample_size")
    for number in side if isinstance(side, list) and len(side) == 2 else [side]:
        if type(number) is not int or not 0 < number <= LARGEST_SAMPLE:
            raise ModelError(f"sample_size is {str(side)[:40]}, not a size", where=str(path))


def check_vae(config: Mapping[str, Any], path: Path) -> None:
    """The factors between the VAE's latents and the UNet's."""
    for key in ("scaling_factor", "shift_factor"):
        value = config.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ModelError(f"{key} is {str(value)[:40]!r}, not a factor", where=str(path))


def check_scheduler(config: Mapping[str, Any], path: Path, classes: set[str]) -> None:
    """A scheduler's class is one of ``classes``, and its noise schedule one that can be computed."""
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in classes:
        raise ModelError(f"_class_name is {str(name)[:60]!r}, not a scheduler that lorakit knows", where=str(path))
    steps = config.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 0 < steps <= MOST_TIMESTEPS:
        raise ModelError(f"num_train_timesteps is {str(steps)[:40]}, not within 1 to {MOST_TIMESTEPS}", where=str(path))
    kind = config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise ModelError(f"the base predicts {str(kind)[:40]!r}, not epsilon or v_prediction", where=str(path))

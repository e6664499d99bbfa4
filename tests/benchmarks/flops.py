"""Floating-point operations that a training step needs, counted from shapes: one multiply-add is two.

The base is frozen, so a linear layer needs its product and the gradient of its input (2 + 2 operations a weight and
token), no gradient of its weight; A and B of LoRA need all three. Attention is Q K' and P V forward (causal: half of
the square) and four such products backward. The head counts at labelled tokens only. Elementwise work, norms, softmax
and optimizer count as nothing, and work that a trainer does beyond this (padding, unlabelled logits, recomputation)
does not count either. Work that can be left out below the lowest adapted layer is counted, about one layer in thirty.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LlamaShape:
    """What the count needs of a model: L layers of width D, H heads and K key-value heads of ``head`` numbers each, an
    MLP of width F, V tokens, LoRA of rank r on q, k, v, o."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head: int
    mlp: int
    vocabulary: int
    rank: int

    @classmethod
    def of(cls, config: Any, rank: int) -> "LlamaShape":
        """From a transformers config."""
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            head,
            config.intermediate_size,
            config.vocab_size,
            rank,
        )


def llama_step(shape: LlamaShape, lengths: Sequence[int], labelled: int, shared: int) -> float:
    """Operations of one update on documents of ``lengths`` tokens with ``labelled`` labels.

    All begin with the same ``shared`` tokens, whose states are the same in each, so that they are needed once.
    """
    tokens = sum(lengths) - (len(lengths) - 1) * shared
    q, kv = shape.heads * shape.head, shape.kv_heads * shape.head
    projections = ((shape.width, q), (shape.width, kv), (shape.width, kv), (q, shape.width))
    weights = sum(a * b for a, b in projections) + 3 * shape.width * shape.mlp
    lora = sum(shape.rank * (a + b) for a, b in projections)
    linear = shape.layers * tokens * (4 * weights + 6 * lora)
    squares = sum(length**2 - shared**2 for length in lengths) / 2 + shared**2 / 2
    attention = shape.layers * squares * q * 2 * (2 + 4)
    return linear + attention + 4 * labelled * shape.width * shape.vocabulary


def unet_step(config: dict[str, Any], batch: int, tokens: int) -> float:
    """Operations of one update of a frozen UNet on ``batch`` latents of its own size and ``tokens`` text tokens.

    The forward pass is counted by PyTorch's counter on shapes without data: products of weights count twice (forward,
    input's gradient), attention's three times. LoRA of low rank, under one in a hundred, is left out.
    """
    import torch
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    kind: Any = UNet2DConditionModel
    with torch.device("meta"), torch.no_grad():
        unet = kind.from_config(config)
        noisy = torch.empty(batch, config["in_channels"], config["sample_size"], config["sample_size"])
        text = torch.empty(batch, tokens, config["cross_attention_dim"])
        with FlopCounterMode(display=False) as counter:
            unet(noisy, torch.zeros(batch, dtype=torch.int64), text)
    counts: dict[str, int] = {str(name): int(count) for name, count in counter.get_flop_counts()["Global"].items()}
    attention = sum(count for name, count in counts.items() if "attention" in name or "bmm" in name)
    return 2.0 * (sum(counts.values()) - attention) + 3.0 * attention

"""The blocks of plain LLaMA-type models (LLaMA, Mistral, Qwen2), run on a packed row by lorakit's own arithmetic.

transformers' modules keep the weights and the adapter; only the walk through them is ours, so that nothing is computed
that no label needs, norms, rotary positions and SwiGLU make few passes, and the row is packed once for all layers.

Shapes: ``T`` tokens of the row, ``W`` width, ``H`` query heads, ``K`` key-value heads, ``D`` head dim, ``N`` labels.
"""

from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorakit.adapters.linear import all_of
from lorakit.numerics.elementwise import rms_norm, rotate, signed, swiglu
from lorakit.numerics.packed_attention import packed_attention
from lorakit.numerics.packing import Packing

KINDS = frozenset({"LlamaModel", "MistralModel", "Qwen2Model"})
"""transformers' decoders whose block is RMSNorm, rotary grouped-query attention, RMSNorm, SwiGLU, and nothing more."""


def of_llama_kind(decoder: Any) -> bool:
    """Whether transformers' decoder has only such blocks."""
    return type(decoder).__name__ in KINDS and decoder.config.hidden_act in ("silu", "swish")


def are_plain(decoder: Any) -> bool:
    """Whether ``hidden_states`` computes what the decoder itself does, and all gradients that it gives."""
    if not of_llama_kind(decoder) or decoder.config.attention_dropout:
        return False
    norms = (decoder.norm, *(norm for layer in decoder.layers for norm in _norms(layer)))
    return not any(norm.weight.requires_grad for norm in norms)


def _norms(layer: Any) -> tuple[Any, Any]:
    return layer.input_layernorm, layer.post_attention_layernorm


def _window(attention: Any) -> int | None:
    """Tokens that one sees in this layer: Mistral's leave it to the config, Qwen2's have their own, LLaMA's have none
    whatever the config says."""
    holder = attention.config if attention.config.model_type == "mistral" else attention
    window: int | None = getattr(holder, "sliding_window", None)
    return window


def hidden_states(
    decoder: Any, tokens: Tensor, positions: Tensor, packing: Packing, learned: Tensor, *, checkpointing: bool
) -> Tensor:
    """The last hidden states, after the norm, at the places ``learned`` [N] of the row: [N, W].

    Args:
        decoder: one that ``are_plain``.
        tokens, positions: int64 [T].
        packing: where the documents are.
        learned: int64 [N], places in the row; one may come several times.
        checkpointing: recompute each block in the backward pass.
    """
    x = decoder.embed_tokens(tokens)
    cos, sin = decoder.rotary_emb(x[None], positions[None])
    turn = cos[0].unsqueeze(1), signed(sin[0]).unsqueeze(1)
    last = len(decoder.layers) - 1
    for number, layer in enumerate(decoder.layers):
        inputs = layer, x, turn, packing, learned if number == last else None
        x = checkpoint(block, *inputs, use_reentrant=False) if checkpointing else block(*inputs)
    return rms_norm(x, decoder.norm.weight, decoder.norm.variance_epsilon)


def block(layer: Any, x: Tensor, turn: tuple[Tensor, Tensor], packing: Packing, learned: Tensor | None) -> Tensor:
    """One block: [T, W] -> [T, W]; in the last one, all behind the attention only at ``learned``: [N, W].

    ``turn``: cosines and signed sines [T, 1, D] of each token's position.
    """
    before, between = _norms(layer)
    attention, mlp = layer.self_attn, layer.mlp
    normed = rms_norm(x, before.weight, before.variance_epsilon)
    projected = all_of((attention.q_proj, attention.k_proj, attention.v_proj), normed)
    q, k, v = (x.view(len(x), -1, attention.head_dim) for x in projected)
    turned = rotate(q, *turn), rotate(k, *turn)
    mixed = packed_attention(*turned, v, packing, attention.scaling, _window(attention)).flatten(1)
    if learned is not None:
        x, mixed = x.index_select(0, learned), mixed.index_select(0, learned)
    x = x + attention.o_proj(mixed)
    normed = rms_norm(x, between.weight, between.variance_epsilon)
    inner = swiglu(*all_of((mlp.gate_proj, mlp.up_proj), normed))
    out: Tensor = x + mlp.down_proj(inner)
    return out

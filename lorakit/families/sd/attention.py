"""The UNet's attention by lorakit's own kernel choice (``numerics.attention``), behind diffusers' processor interface.

Shapes: ``B`` pictures, ``T`` places of the picture, ``S`` tokens attended to, ``W`` width, ``H`` heads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from lorakit.numerics.attention import full_attention

_diffusers: Any = AttnProcessor2_0  # diffusers has no types


class Processor:
    """diffusers' ``AttnProcessor2_0`` for blocks without masks and norms of their own, as in every UNet of SD 1.x, 2.x
    and XL; for any other call diffusers' own."""

    def __init__(self) -> None:
        self._other = _diffusers()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """[B, T, W] attends to itself, or to ``encoder_hidden_states`` [B, S, W']."""
        norms = (attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k)
        if hidden_states.ndim != 3 or attention_mask is not None or any(norm is not None for norm in norms):
            out: Tensor = self._other(attn, hidden_states, encoder_hidden_states, attention_mask, **options)
            return out
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            layer(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, states in ((attn.to_q, hidden_states), (attn.to_k, seen), (attn.to_v, seen))
        )
        mixed = full_attention(q, k, v, attn.scale).transpose(1, 2).flatten(2)
        mixed = attn.to_out[1](attn.to_out[0](mixed))
        if attn.residual_connection:
            mixed = mixed + hidden_states
        if attn.rescale_output_factor != 1:
            mixed = mixed / attn.rescale_output_factor
        return cast(Tensor, mixed)


def use_own_attention(unet: nn.Module) -> None:
    """Give every attention block of a UNet the processor."""
    model: Any = unet
    model.set_attn_processor(Processor())


@contextmanager
def diffusers_attention(unet: nn.Module) -> Iterator[None]:
    """diffusers' own processor in every attention block, for as long as the block lasts."""
    model: Any = unet
    before = dict(model.attn_processors)
    model.set_attn_processor(_diffusers())
    try:
        yield
    finally:
        model.set_attn_processor(before)

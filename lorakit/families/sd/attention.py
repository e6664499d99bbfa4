"""The UNet's attention by lorakit's own kernel choice (``numerics.attention``), behind diffusers' processor interface.

Shapes: ``B`` pictures, ``T`` places of the picture, ``S`` tokens attended to, ``W`` width, ``H`` heads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from lorakit.adapters.linear import all_of
from lorakit.numerics.attention import full_attention

_diffusers: Any = AttnProcessor2_0  # diffusers has no types


class Processor:
    """diffusers' ``AttnProcessor2_0`` for blocks without masks and norms of their own, as in every UNet of SD 1.x, 2.x
    and XL; for any other call diffusers' own."""

    def __init__(self, *, text_once: bool = False) -> None:
        """``text_once``: the text of the first call is that of all calls."""
        self._other = _diffusers()
        self._text_once = text_once
        self._text: tuple[Tensor, ...] | None = None

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
        if encoder_hidden_states is None:
            q, k, v = _heads(attn, hidden_states, attn.to_q, attn.to_k, attn.to_v)
        else:
            (q,) = _heads(attn, hidden_states, attn.to_q)
            k, v = self._text or _heads(attn, encoder_hidden_states, attn.to_k, attn.to_v)
            if self._text_once:
                self._text = k, v
        mixed = full_attention(q, k, v, attn.scale).transpose(1, 2).flatten(2)
        mixed = attn.to_out[1](attn.to_out[0](mixed))
        if attn.residual_connection:
            mixed = mixed + hidden_states
        if attn.rescale_output_factor != 1:
            mixed = mixed / attn.rescale_output_factor
        return cast(Tensor, mixed)


def _heads(attn: Any, states: Tensor, *layers: Any) -> tuple[Tensor, ...]:
    """[B, H, S, W / H] of each layer."""
    return tuple(x.view(*x.shape[:-1], attn.heads, -1).transpose(1, 2) for x in all_of(layers, states))


def use_own_attention(unet: nn.Module) -> None:
    """Give every attention block of a UNet the processor."""
    model: Any = unet
    model.set_attn_processor(Processor())


@contextmanager
def text_once(unet: nn.Module) -> Iterator[None]:
    """For as long as the block lasts the text does not change: its keys and values are computed in the first call."""
    model: Any = unet
    before = dict(model.attn_processors)
    model.set_attn_processor({name: Processor(text_once=True) for name in before})
    try:
        yield
    finally:
        model.set_attn_processor(before)


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

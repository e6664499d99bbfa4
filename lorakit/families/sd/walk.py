"""The UNet of SD 1.x, 2.x and XL for drawing: what diffusers' computes, in few calls and over layers packed once.

Shapes: ``B`` pictures, ``C`` channels, ``h`` and ``w`` sides, ``P`` = h w places, ``W`` width of a block, ``L`` tokens
of the text, ``S`` steps, ``D`` width of an embedded timestep. What is the same in every step is computed before them:
the embeddings of all timesteps, and the keys and values of the text.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets import unet_2d_blocks as blocks
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional

from lorakit.families.sd.layers import Block, Convolution, Gate
from lorakit.numerics import onednn
from lorakit.numerics.attention import full_attention
from lorakit.numerics.frozen import norm_silu

Text = tuple[Tensor, Tensor]
"""Keys and values of the text, [B, H, L, W / H] each."""

_FRAME: Any = (UNet2DConditionModel, nn.ModuleList, Timesteps, TimestepEmbedding, nn.SiLU, nn.Dropout)
_STAGES: Any = (
    blocks.DownBlock2D, blocks.CrossAttnDownBlock2D, blocks.UNetMidBlock2DCrossAttn,
    blocks.CrossAttnUpBlock2D, blocks.UpBlock2D, Upsample2D, Downsample2D,
)  # fmt: skip
_LAYERS: Any = (
    Block, Convolution, Gate, Transformer2DModel, BasicTransformerBlock, Attention, FeedForward,
    nn.GroupNorm, nn.LayerNorm, nn.Linear,
)  # fmt: skip


_USUAL = {
    "act_fn": "silu", "attention_type": "default", "center_input_sample": False, "class_embed_type": None,
    "cross_attention_norm": None, "downsample_padding": 1, "encoder_hid_dim_type": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "only_cross_attention": False, "time_embedding_act_fn": None,
    "time_embedding_type": "positional",
}  # fmt: skip


def can_walk(unet: nn.Module) -> bool:
    """Whether a UNet is on a CPU, has no adapters, and is made of nothing but what SD 1.x, 2.x and XL are made of."""
    config: Any = unet.config
    usual = config.addition_embed_type in (None, "text_time") and all(config[k] == v for k, v in _USUAL.items())
    known = {type(module) for module in unet.modules()} <= {*_FRAME, *_STAGES, *_LAYERS}
    return usual and known and next(unet.parameters()).device.type == "cpu"


class Walk:
    """Predicts noise from stage to stage of a UNet that ``can_walk``."""

    def __init__(self, unet: nn.Module) -> None:
        model: Any = unet
        self._unet = model
        self._enter, self._leave = _layer(model.conv_in), _layer(model.conv_out)
        self._down = [_Stage(block, "downsamplers") for block in model.down_blocks]
        self._middle = _Stage(model.mid_block, "")
        self._up = [_Stage(block, "upsamplers") for block in model.up_blocks]
        steps = [step for stage in (*self._down, self._middle, *self._up) for step in stage.steps]
        self._blocks = [block for step in steps if step.transformer for block in step.transformer.blocks]
        projections = [step.resnet.time for step in steps]
        self._shift = _stacked(projections)
        self._widths = [projection.out_features for projection in projections]

    def start(
        self, timesteps: Tensor, encoder_hidden_states: Tensor, added_cond_kwargs: dict[str, Tensor] | None = None
    ) -> Callable[[Tensor, int], Tensor]:
        """What predicts noise at the step of a number: from latents [B, C, h, w] for as many texts, or several times
        as many, then the latents over and over. What comes before any text is heard is computed once for all.
        """
        model, dtype = self._unet, encoder_hidden_states.dtype
        times = model.time_embedding(model.time_proj(timesteps).to(dtype))[:, None]  # [S, 1, D]
        added = model.get_aug_embed(
            emb=times, encoder_hidden_states=encoder_hidden_states, added_cond_kwargs=added_cond_kwargs
        )
        texts = [block.read(encoder_hidden_states) for block in self._blocks]
        return partial(self._predict, times if added is None else times + added, texts)

    def _predict(self, times: Tensor, texts: Sequence[Text], latents: Tensor, number: int) -> Tensor:
        """``times`` [S, B or 1, D]; ``texts``, one a block."""
        shifts = iter(torch.split(self._shift(functional.silu(times[number]))[..., None, None], self._widths, 1))
        heard = iter(texts)

        def after(step: "_Step", x: Tensor) -> Tensor:
            x = step.resnet(x, next(shifts))
            return x if step.transformer is None else step.transformer(x, heard)

        x = self._enter(_as_many(latents, times.shape[1]))
        skips = [x]
        for stage in self._down:
            for step in stage.steps:
                x = after(step, x)
                skips.append(x)
            if stage.resize is not None:
                x = stage.resize(x)
                skips.append(x)
        for step in self._middle.steps:
            x = after(step, x)
        for stage in self._up:
            for step in stage.steps:
                x = after(step, torch.cat([x, _as_many(skips.pop(), len(x))], 1))
            if stage.resize is not None:
                x = stage.resize(functional.interpolate(x, size=skips[-1].shape[2:], mode="nearest"))
        return self._leave(_norm_silu(self._unet.conv_norm_out, x))


class _Stage:
    """The steps at one resolution, and the convolution that leads to the next where there is one."""

    def __init__(self, block: Any, resize: str) -> None:
        attentions = getattr(block, "attentions", [])
        self.steps = [
            _Step(_Resnet(resnet), None if transformer is None else _Transformer(transformer))
            for resnet, transformer in zip_longest(block.resnets, attentions)
        ]
        found = getattr(block, resize, None)
        self.resize = None if found is None else _layer(found[0].conv)


class _Step(NamedTuple):
    """A residual block, and a transformer after it where there is one."""

    resnet: "_Resnet"
    transformer: "_Transformer | None"


class _Resnet:
    """Two convolutions over norms, added to their input."""

    def __init__(self, block: Any) -> None:
        self.time = block.time_emb_proj
        self._norms, self._scale = (block.norm1, block.norm2), block.output_scale_factor
        self._first, self._second = _layer(block.conv1), _layer(block.conv2)
        self._shortcut = None if block.conv_shortcut is None else _layer(block.conv_shortcut)

    def __call__(self, x: Tensor, shift: Tensor) -> Tensor:
        """x [B, C, h, w]; ``shift`` [B or 1, C', 1, 1], what the timestep adds -> [B, C', h, w]."""
        first, second = self._norms
        hidden = self._first(_norm_silu(first, x)).add_(shift)
        hidden = self._second(_norm_silu(second, hidden))
        hidden += x if self._shortcut is None else self._shortcut(x)
        return hidden if self._scale == 1 else hidden / self._scale


class _Transformer:
    """Attention and MLP over the places of a picture."""

    def __init__(self, model: Any) -> None:
        self._norm = model.norm
        self._enter, self._leave = _pointwise(model.proj_in), _pointwise(model.proj_out)
        self.blocks = [_Block(block) for block in model.transformer_blocks]

    def __call__(self, x: Tensor, texts: Iterator[Text]) -> Tensor:
        """x [B, C, h, w], a picture for each text, or fewer for all texts -> a picture for each text."""
        rows = self._enter(_norm(self._norm, x).flatten(2).transpose(1, 2))
        for block in self.blocks:
            rows = block(rows, next(texts))
        return self._leave(rows).transpose(1, 2).view(-1, *x.shape[1:]).add_(_as_many(x, len(rows)))


class _Block:
    """Attention to the picture, attention to the text, a gated MLP: each over a layer norm, and added to its input."""

    def __init__(self, block: Any) -> None:
        self._norms = block.norm1, block.norm2, block.norm3
        own, other = block.attn1, block.attn2
        self._heads, self._scale = own.heads, own.scale
        self._own, self._own_out = _stacked([own.to_q, own.to_k, own.to_v]), _stacked([own.to_out[0]])
        self._asked, self._told, self._out = (
            _stacked(layers) for layers in ([other.to_q], [other.to_k, other.to_v], [other.to_out[0]])
        )
        self._up, self._down = _stacked([block.ff.net[0].proj]), _stacked([block.ff.net[2]])

    def read(self, states: Tensor) -> Text:
        """Keys and values of a text [B, L, W']."""
        keys, values = self._split(self._told(states), 2)
        return keys, values

    def __call__(self, rows: Tensor, text: Text) -> Tensor:
        """rows [B, P, W], as many as texts or fewer -> [B, P, W], as many as texts."""
        first, second, third = self._norms
        q, k, v = self._split(self._own(first(rows)), 3)
        rows = _as_many(rows + self._own_out(self._mix(q, k, v)), len(text[0]))
        (q,) = self._split(self._asked(second(rows)), 1)
        rows += self._out(self._mix(q, *text))
        value, gate = self._up(third(rows)).chunk(2, -1)
        rows += self._down(functional.gelu(gate).mul_(value))
        return rows

    def _split(self, rows: Tensor, parts: int) -> Iterator[Tensor]:
        """[B, L, parts * W] to parts of [B, H, L, W / H]."""
        shape = (*rows.shape[:2], self._heads, -1)
        return (part.view(shape).transpose(1, 2) for part in rows.chunk(parts, -1))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return full_attention(q, k, v, self._scale).transpose(1, 2).flatten(2)


def _as_many(x: Tensor, pictures: int) -> Tensor:
    """x over and over, until there are so many."""
    return x if len(x) >= pictures else torch.cat([x] * (pictures // len(x)))


def _norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """In plain rows: PyTorch's norm of channels_last is many times slower than the copy."""
    return functional.group_norm(x.contiguous(), norm.num_groups, norm.weight, norm.bias, norm.eps)


def _norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return norm_silu(x.contiguous(), norm.num_groups, norm.weight, norm.bias, norm.eps)


def _layer(conv: nn.Conv2d) -> onednn.Layer:
    return onednn.Convolution(conv.weight, conv.bias, conv.stride[0], int(conv.padding[0]))


def _pointwise(layer: Any) -> onednn.Layer:
    """A 1x1 convolution or a linear layer, over rows."""
    return onednn.linear(layer.weight.flatten(1), layer.bias)


def _stacked(layers: Sequence[Any]) -> onednn.Layer:
    """Linear layers that read the same rows, their outputs side by side; all or none have a bias."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return onednn.linear(torch.cat([layer.weight for layer in layers]), torch.cat(biases) if biases else None)

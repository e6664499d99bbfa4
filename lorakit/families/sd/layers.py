"""The UNet's frozen layers by ``numerics.frozen``, each in place of diffusers' own, with the same parameters.

A layer that has got an adapter, or is of another shape than Stable Diffusion's, stays as diffusers has it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from lorakit.numerics.frozen import convolve, geglu, norm_silu

_geglu: Any = GEGLU  # diffusers has no types
_resnet: Any = ResnetBlock2D


class Convolution(nn.Conv2d):
    """Without groups, dilation or a padding by name.

    PEFT makes a convolution's A and B of the class of what it wraps: where the weight is trained, this is torch's own.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.requires_grad:
            return super().forward(input)
        return convolve(input, self.weight, self.bias, self.stride[0], int(self.padding[0]))


class Gate(_geglu):  # type: ignore[misc]
    """diffusers' GEGLU."""

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        if type(self.proj) is not nn.Linear or self.proj.bias is None:
            out: Tensor = super().forward(hidden_states, *args, **options)
            return out
        return geglu(hidden_states, self.proj.weight, self.proj.bias)


class Block(_resnet):  # type: ignore[misc]
    """diffusers' ResnetBlock2D with SiLU, and time added before the second norm."""

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **options: Any) -> Tensor:  # noqa: ARG002
        hidden = self.conv1(_normed(self.norm1, input_tensor))
        hidden = hidden + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        hidden = self.conv2(self.dropout(_normed(self.norm2, hidden)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        hidden = hidden + input_tensor
        out: Tensor = hidden if self.output_scale_factor == 1 else hidden / self.output_scale_factor
        return out


def _normed(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


_KINDS: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: Convolution, _geglu: Gate, _resnet: Block}


def use_own_layers(unet: nn.Module) -> None:
    """Give every layer that can have it its own forward pass."""
    for module in unet.modules():
        if type(module) in _KINDS and _fits(module):
            module.__class__ = _KINDS[type(module)]


@contextmanager
def diffusers_layers(unet: nn.Module) -> Iterator[None]:
    """diffusers' own forward pass in every layer, for as long as the block lasts."""
    plain = {own: theirs for theirs, own in _KINDS.items()}
    changed = [module for module in unet.modules() if type(module) in plain]
    for module in changed:
        module.__class__ = plain[type(module)]
    try:
        yield
    finally:
        for module in changed:
            module.__class__ = _KINDS[type(module)]


@contextmanager
def without_checkpointing(unet: nn.Module) -> Iterator[None]:
    """No activations are recomputed of what runs in the block."""
    own: list[Any] = [module for module in unet.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in own:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in own:
            module.gradient_checkpointing = True


def _fits(module: Any) -> bool:
    if isinstance(module, nn.Conv2d):
        square = len({*module.stride}) == 1 and not isinstance(module.padding, str) and len({*module.padding}) == 1
        return square and module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
    if isinstance(module, _resnet):
        plain = module.upsample is None and module.downsample is None and module.time_emb_proj is not None
        simple = module.time_embedding_norm == "default" and not module.skip_time_act
        return plain and simple and isinstance(module.nonlinearity, nn.SiLU)
    return True

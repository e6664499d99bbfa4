"""The UNet with lorakit's frozen layers beside the same UNet with diffusers'."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from lorakit.adapters.inject import adapter_parameters, adapter_state, inject, load_adapter_state
from lorakit.families.place import Place
from lorakit.families.sd.attention import diffusers_attention
from lorakit.families.sd.base import load_parts
from lorakit.families.sd.layers import Block, Convolution, Gate, diffusers_layers
from lorakit.families.sd.targets import UNET_GROUPS
from lorakit.recipe.schema import SDAdapter
from lorakit.storage.bases import resolve
from tests.tiny import tiny_sd

OWN = {Block, Convolution, Gate}
CONVOLUTIONS = ["conv_in", "conv1", "conv2", "conv_shortcut", "conv", "conv_out"]
THEIRS: set[Any] = {ResnetBlock2D, nn.Conv2d, GEGLU}


@pytest.fixture
def unet(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    tiny_sd(tmp_path / "base")
    return load_parts(resolve(str(tmp_path / "base")), Place(torch.device("cpu"), request.param)).unet


def results(unet: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The output, and the gradients of input and adapter."""
    torch.manual_seed(0)
    noisy, text = torch.randn(2, unet.config.in_channels, 8, 8), torch.randn(2, 5, unet.config.cross_attention_dim)
    x = noisy.to(dtype).requires_grad_()
    out = unet(x, torch.tensor([3, 700]), text.to(dtype)).sample
    wanted = {"input": x, **adapter_parameters(unet)}
    gradients = torch.autograd.grad(out.float().square().sum(), list(wanted.values()))
    return {"output": out.double()} | {name: g.double() for name, g in zip(wanted, gradients, strict=True)}


def learned(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


@pytest.mark.parametrize("unet", [torch.float32, torch.bfloat16], indirect=True)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", ["attention", "all-linear", CONVOLUTIONS, ["to_q", "ff.net.2", "conv1"]])
def test_the_unet_and_its_gradients_are_as_near_to_float64_as_diffusers(unet: Any, targets: Any, dora: bool) -> None:
    inject(unet, SDAdapter(rank=2, targets=targets, dora=dora), UNET_GROUPS, seed=0)
    load_adapter_state(unet, learned(adapter_state(unet)))
    assert {type(module) for module in unet.modules()} & (OWN | THEIRS) == OWN
    dtype = unet.dtype
    own = results(unet, dtype)
    with diffusers_attention(unet), diffusers_layers(unet):
        assert {type(module) for module in unet.modules()} & (OWN | THEIRS) == THEIRS
        other, wanted = results(unet, dtype), results(copy.deepcopy(unet).double(), torch.float64)
    assert {type(module) for module in unet.modules()} & (OWN | THEIRS) == OWN
    ours, theirs = (
        torch.stack([(x[name] - exact).norm() / exact.norm() for name, exact in wanted.items()]) for x in (own, other)
    )
    assert ours.norm() <= 1.5 * theirs.norm()
    # A small tensor's errors are few, and those of one path may happen to cancel.
    assert (ours <= 4 * theirs + 4 * torch.finfo(dtype).eps).all(), list(zip(wanted, ours, theirs, strict=True))

"""The UNet with lorakit's frozen layers beside the same UNet with diffusers'."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from lorakit.adapters.inject import inject
from lorakit.families.place import Place
from lorakit.families.sd.attention import diffusers_attention
from lorakit.families.sd.base import load_parts
from lorakit.families.sd.layers import Block, Convolution, Gate, diffusers_layers
from lorakit.families.sd.targets import UNET_GROUPS
from lorakit.recipe.schema import SDAdapter
from lorakit.storage.bases import resolve
from tests.tiny import tiny_sd

OWN = {Block, Convolution, Gate}
THEIRS: set[Any] = {ResnetBlock2D, nn.Conv2d, GEGLU}


@pytest.fixture
def unet(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    tiny_sd(tmp_path / "base")
    return load_parts(resolve(str(tmp_path / "base")), Place(torch.device("cpu"), request.param)).unet


def results(unet: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    noisy, text = torch.randn(2, unet.config.in_channels, 8, 8), torch.randn(2, 5, unet.config.cross_attention_dim)
    x = noisy.to(dtype).requires_grad_()
    out = unet(x, torch.tensor([3, 700]), text.to(dtype)).sample
    (gradient,) = torch.autograd.grad(out.float().square().sum(), x)
    return [out.double(), gradient.double()]


@pytest.mark.parametrize("unet", [torch.float32, torch.bfloat16], indirect=True)
@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_the_unet_and_its_gradients_are_as_near_to_float64_as_diffusers(unet: Any, targets: Any) -> None:
    inject(unet, SDAdapter(rank=2, targets=targets), UNET_GROUPS, seed=0)
    assert {type(module) for module in unet.modules()} & (OWN | THEIRS) == OWN
    dtype = unet.dtype
    own = results(unet, dtype)
    with diffusers_attention(unet), diffusers_layers(unet):
        assert {type(module) for module in unet.modules()} & (OWN | THEIRS) == THEIRS
        other, wanted = results(unet, dtype), results(copy.deepcopy(unet).double(), torch.float64)
    assert {type(module) for module in unet.modules()} & (OWN | THEIRS) == OWN
    for ours, theirs, exact in zip(own, other, wanted, strict=True):
        assert exact.norm() > 0
        assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()

"""The walk for drawing beside diffusers' own UNet with its own layers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from lorakit.adapters.inject import inject
from lorakit.families.place import Place
from lorakit.families.sd.attention import diffusers_attention
from lorakit.families.sd.base import load_parts
from lorakit.families.sd.layers import diffusers_layers, use_own_layers
from lorakit.families.sd.targets import UNET_GROUPS
from lorakit.families.sd.walk import Walk, can_walk
from lorakit.recipe.schema import SDAdapter
from lorakit.storage.bases import resolve
from tests.tiny import tiny_sd, tiny_sd_unet, tiny_sdxl

MAKE = {"sd": tiny_sd, "sdxl": tiny_sdxl}
TIMESTEPS = torch.tensor([981, 500, 1])


def unet_of(folder: Path, dtype: torch.dtype) -> Any:
    return load_parts(resolve(str(folder)), Place(torch.device("cpu"), dtype)).unet


def told(unet: Any, pictures: int) -> dict[str, Any]:
    """What a UNet is told for so many pictures, each something else."""
    given: dict[str, Any] = {"encoder_hidden_states": torch.randn(pictures, 5, unet.config.cross_attention_dim)}
    if unet.config.addition_embed_type == "text_time":
        width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        sizes = torch.tensor([[64.0, 48.0, 0.0, 0.0, 64.0, 48.0]] * pictures)
        given["added_cond_kwargs"] = {"text_embeds": torch.randn(pictures, width), "time_ids": sizes}
    return given


def cast(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same in another dtype, sizes in pixels as they are."""
    tensors = {name: value.to(dtype) for name, value in given.items() if name != "added_cond_kwargs"}
    added = given.get("added_cond_kwargs", {})
    return (
        tensors | {"added_cond_kwargs": added | {"text_embeds": added["text_embeds"].to(dtype)}} if added else tensors
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@torch.no_grad()
def test_predictions_are_as_near_to_float64_as_diffusers(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    unet = unet_of(MAKE[kind](tmp_path / "base"), dtype)
    walk, exact = Walk(unet), copy.deepcopy(unet).double()
    torch.manual_seed(0)
    for pictures, size in ((1, (8, 8)), (3, (8, 6)), (3, (7, 10))):
        given = told(unet, pictures)
        predict = walk.start(TIMESTEPS, **cast(given, dtype))
        for number, timestep in enumerate(TIMESTEPS):
            latents = torch.randn(pictures, unet.config.in_channels, *size)
            kept = latents.to(dtype)
            own = predict(kept, number)
            with diffusers_attention(unet), diffusers_layers(unet):
                theirs = unet(kept, timestep, **cast(given, dtype)).sample
            with diffusers_attention(exact), diffusers_layers(exact):
                wanted = exact(kept.double(), timestep, **cast(given, torch.float64)).sample
            assert own.dtype == dtype
            assert wanted.norm() > 0
            assert (own - wanted).norm() <= 1.5 * (theirs - wanted).norm()
            assert torch.equal(kept, latents.to(dtype))
        one = latents[:1].to(dtype)
        shared, each = predict(one, 2), predict(torch.cat([one] * pictures), 2)
        torch.testing.assert_close(shared, each, rtol=0, atol=1e-5 if dtype == torch.float32 else 3e-2)


def test_no_walk_without_plain_layers_on_a_cpu(tmp_path: Path) -> None:
    unet = unet_of(tiny_sd(tmp_path / "base"), torch.float32)
    assert can_walk(unet)
    assert not can_walk(copy.deepcopy(unet).to("meta"))
    with diffusers_layers(unet):
        assert not can_walk(unet)
    inject(unet, SDAdapter(rank=2, alpha=2.0), UNET_GROUPS, seed=0)
    assert not can_walk(unet)


@pytest.mark.parametrize(
    "other",
    [
        {"mid_block_type": None},
        {"downsample_padding": 0},
        {"only_cross_attention": True},
        {"class_embed_type": "timestep"},
        {"num_class_embeds": 3},
        {"time_embedding_type": "fourier"},
        {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 8},
        {"resnet_time_scale_shift": "scale_shift"},
        {"down_block_types": ("AttnDownBlock2D", "CrossAttnDownBlock2D")},
    ],
)
def test_no_walk_through_another_unet(other: dict[str, Any]) -> None:
    usual = {k: v for k, v in tiny_sd_unet().config.items() if k != "_use_default_values"}
    for config, walked in ((usual, True), ({**usual, **other}, False)):
        unet: Any = UNet2DConditionModel.from_config(config)
        use_own_layers(unet)
        assert can_walk(unet) == walked

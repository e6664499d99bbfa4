"""A base's modules without weights."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from lorakit.data.images import Size
from lorakit.families.sd.base import native_size, read_schedule, vae_factor
from lorakit.families.sd.conditioning import Conditioning, conditioning_of
from lorakit.families.sd.single_file import make_encoders, read_configs
from lorakit.storage.bases import BaseLocation
from lorakit.storage.checks import read_json, weight_stems
from lorakit.storage.foreign import model_errors


@dataclass(frozen=True)
class Skeleton:
    """A base's modules without weights."""

    unet: nn.Module
    conditioning: Conditioning
    """Without tokenizers."""
    vae: nn.Module
    factor: int
    size: Size
    """Width and height in pixels that the base was trained at."""
    schedule: dict[str, Any]

    @property
    def adaptable(self) -> dict[str, nn.Module]:
        """The components that can have LoRA, by name."""
        return {"unet": self.unet, **self.conditioning.encoders}


def skeleton(
    location: BaseLocation, dtype: torch.dtype, place: AbstractContextManager[object] | None = None
) -> Skeleton:
    """A base's modules made in ``place``: on the meta device where none is given.

    Raises: ModelError when a config does not make a model.
    """
    place = torch.device("meta") if place is None else place
    with model_errors(location.name, "the config does not make a model"):
        if location.layout == "single-file":
            configs = read_configs(location.path)
            unet, vae, schedule = configs.unet, configs.vae, configs.schedule
            texts = configs.texts
        else:
            parts = ("vae", *weight_stems(location.path))
            configs_of = {part: read_json(location.path / part / "config.json") for part in parts}
            unet, vae, schedule = configs_of["unet"], configs_of["vae"], read_schedule(location.path)
            texts = {part: config for part, config in configs_of.items() if part.startswith("text_encoder")}
        with place:
            unet_class: Any = UNet2DConditionModel
            vae_class: Any = AutoencoderKL
            encoders = make_encoders(texts)
            for encoder in encoders.values():
                encoder.to(dtype).requires_grad_(False)
            return Skeleton(
                nn.Module.to(unet_class.from_config(unet), dtype).requires_grad_(False),  # diffusers' own warns
                conditioning_of([], encoders, zeros=False),
                vae_class.from_config(vae).requires_grad_(False),
                vae_factor(vae),
                native_size(unet, vae),
                schedule,
            )

"""A Stable Diffusion base in memory: text encoders, UNet, VAE, and the noise schedule it was trained with."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lorakit.errors import ModelError
from lorakit.families.place import Place
from lorakit.families.sd.attention import use_own_attention
from lorakit.families.sd.conditioning import Conditioning, check_widths, conditioning_of
from lorakit.families.sd.layers import use_own_layers
from lorakit.families.sd.single_file import load_single_file, load_tokenizers
from lorakit.numerics.diffusion import PredictionType, has_zero_terminal_snr
from lorakit.storage.bases import BaseLocation
from lorakit.storage.checks import WEIGHTS, read_json, shapes, shard_files
from lorakit.storage.foreign import check_complete, model_errors

# diffusers has no types, and transformers' do not know what output_loading_info changes
_unet: Any = UNet2DConditionModel
_vae: Any = AutoencoderKL
_ddpm: Any = DDPMScheduler
_text: dict[str, Any] = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


@dataclass(frozen=True)
class Parts:
    """The pieces of one base. UNet and text encoders in the place's dtype, the VAE always in float32.

    (Some VAEs overflow in float16, and bf16 has too few digits for a picture.)
    """

    conditioning: Conditioning
    unet: nn.Module
    vae: Any
    schedule: Mapping[str, Any]
    """scheduler_config.json."""

    @property
    def adaptable(self) -> dict[str, nn.Module]:
        """The components that can have LoRA, by name."""
        return {"unet": self.unet, **self.conditioning.encoders}

    @property
    def factor(self) -> int:
        """Pixels of a picture's side for one of its latents' side."""
        return vae_factor(self.vae.config)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels that the base was trained at."""
        return native_size(cast(Any, self.unet).config, self.vae.config)


def vae_factor(config: Any) -> int:
    """2 to the number of halvings in a VAE's encoder."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def native_size(unet: Any, vae: Any) -> tuple[int, int]:
    """Width and height in pixels, from the configs of a UNet and a VAE."""
    side = unet["sample_size"]
    height, width = (side, side) if isinstance(side, int) else side
    return width * vae_factor(vae), height * vae_factor(vae)


def load_parts(location: BaseLocation, place: Place) -> Parts:
    """Load a base on ``place``, frozen.

    Raises: ModelError when a part does not load or does not fit the others.
    """
    if location.layout == "single-file":
        loaded = load_single_file(location.path, place.dtype)
        parts = Parts(load_conditioning(location, loaded.encoders), loaded.unet, loaded.vae, loaded.schedule)
    else:
        parts = _load_folder(location, place.dtype)
    check_widths(parts.conditioning, parts.unet, location.name)
    for module in (*parts.adaptable.values(), parts.vae):
        module.requires_grad_(False).eval().to(place.device)
    use_own_attention(parts.unet)
    use_own_layers(parts.unet)
    return parts


def load_conditioning(location: BaseLocation, encoders: Mapping[str, nn.Module]) -> Conditioning:
    """A base's tokenizers around its text encoders.

    Raises: ModelError when a tokenizer does not load, or is not on this machine.
    """
    if location.layout == "single-file":
        return conditioning_of(list(load_tokenizers(location.path).values()), encoders, zeros=True)
    zeros = bool(read_json(location.path / "model_index.json").get("force_zeros_for_empty_prompt", True))
    folders = [location.path / name.replace("text_encoder", "tokenizer") for name in encoders]
    return conditioning_of([_load_tokenizer(folder) for folder in folders], encoders, zeros=zeros)


def _load_folder(location: BaseLocation, dtype: torch.dtype) -> Parts:
    path = location.path
    encoders = {name: _load_encoder(_text[name], path / name, dtype) for name in _text if (path / name).is_dir()}
    unet = _load_part(_unet, path / "unet", dtype)
    vae = _load_part(_vae, path / "vae", torch.float32)
    return Parts(load_conditioning(location, encoders), unet, vae, read_schedule(path))


def _load_tokenizer(path: Path) -> CLIPTokenizer:
    with model_errors(str(path), "the base does not load"):
        return cast(CLIPTokenizer, CLIPTokenizer.from_pretrained(path, local_files_only=True))


def _load_encoder(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    with model_errors(str(folder), "the base does not load"):
        encoder, report = kind.from_pretrained(folder, dtype=dtype, **options)
        check_complete(report, str(folder))
        return cast(nn.Module, encoder)


def _load_part(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A model of diffusers, which makes room for all that the config says before it looks into the weights."""
    with model_errors(str(folder), "the base does not load"):
        with torch.device("meta"):
            claimed = sum(p.numel() for p in kind.from_config(read_json(folder / "config.json")).parameters())
        held = sum(math.prod(shape) for shape in shapes(shard_files(folder, WEIGHTS[folder.name])).values())
        if claimed > 2 * held:  # less is a tensor that is lacking, which is named below
            raise ModelError(f"the config is for {claimed:,} parameters, the weights are {held:,}", where=str(folder))
        options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
        model, report = kind.from_pretrained(folder, torch_dtype=dtype, **options)
        check_complete(report, str(folder))
        return model


def read_schedule(path: Path) -> dict[str, Any]:
    """scheduler_config.json of a diffusers folder."""
    return read_json(path / "scheduler" / "scheduler_config.json")


def noise_schedule(config: Mapping[str, Any], where: str) -> tuple[Tensor, PredictionType]:
    """alphas_cumprod, float32 [T], and what the UNet predicts.

    Raises: ModelError for another prediction type, or for epsilon on a schedule that ends without any signal
    (Lin et al. 2023, arXiv:2305.08891).
    """
    with model_errors(where, "its scheduler cannot be made"):
        scheduler = _ddpm.from_config(config)
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ModelError(f"the base predicts {kind!r}, not epsilon or v_prediction", where=where)
    alphas = cast(Tensor, scheduler.alphas_cumprod)
    if kind == "epsilon" and has_zero_terminal_snr(alphas):
        reason = "epsilon prediction on a schedule with zero terminal SNR, where epsilon says nothing about the picture"
        raise ModelError(reason, where=where, hint="such a schedule needs a base with v_prediction")
    return alphas, kind


def to_latents(vae: Any, drawn: Tensor) -> Tensor:
    """A draw from the VAE's posterior in the UNet's units: (z - shift) * scale."""
    shift = vae.config.shift_factor or 0.0
    return cast(Tensor, (drawn - shift) * vae.config.scaling_factor)


def from_latents(vae: Any, latents: Tensor) -> Tensor:
    """The inverse of ``to_latents``."""
    shift = vae.config.shift_factor or 0.0
    return cast(Tensor, latents / vae.config.scaling_factor + shift)

"""What a merged Stable Diffusion predicts beside base + adapter: the noise of a few prompts."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters.merging.plan import PlannedAdapter
from lorakit.adapters.merging.reference import difference, parameters_on_meta, run_from_files
from lorakit.errors import ModelError
from lorakit.families.sd.base import load_conditioning
from lorakit.families.sd.conditioning import conditioning_of, ids_of
from lorakit.families.sd.original import open_stable_diffusion
from lorakit.families.sd.skeleton import Skeleton, skeleton
from lorakit.storage.bases import BaseLocation, resolve

PROMPTS = ("a photo of a red fox in the snow", "a castle by the sea, oil on canvas", "")
TIMESTEPS = (20, 500, 980)


def compare(base: BaseLocation, adapters: Sequence[PlannedAdapter], out: Path) -> tuple[float, str]:
    """How far the merged model's prediction is from base + adapter's, in float32, as a share of its spread; and in
    words. A few rows of a weight are in memory at a time.
    """
    text, ids, told = _prompts(base)
    one, other = _running(base, adapters), _running(resolve(str(out)), ())
    side = min(32, *_sides(one))
    expected, found = (_predictions(bones, text, ids, side) for bones in (one, other))
    share = difference(expected, found)
    return share, f"predictions for {told} differ by {share:.2%}"


def _prompts(base: BaseLocation) -> tuple[Any, Tensor, str]:
    """What tells the UNet of a prompt, with the base's text encoders on meta; tokens [B, E, L]; and what they are.

    A single file brings no tokenizer, and needs none to be compared.
    """
    encoders = skeleton(base, torch.float32).conditioning.encoders
    try:
        text = load_conditioning(base, encoders)
    except ModelError:
        if base.layout != "single-file":
            raise
        configs: list[Any] = [encoder.config for encoder in encoders.values()]
        shape = len(PROMPTS), len(configs), min(config.max_position_embeddings for config in configs)
        highest = min(config.vocab_size for config in configs)
        ids = torch.randint(highest, shape, generator=torch.Generator().manual_seed(0))
        return conditioning_of((), encoders, zeros=False), ids, f"{len(ids)} rows of random tokens, for want of CLIP's,"
    return text, ids_of(text, PROMPTS), f"{len(PROMPTS)} prompts"


def _running(location: BaseLocation, adapters: Sequence[PlannedAdapter]) -> Skeleton:
    opened = open_stable_diffusion(location)
    bones = skeleton(location, torch.float32, parameters_on_meta())
    run_from_files(replace(opened, models=bones.adaptable), adapters)
    return bones


def _sides(bones: Skeleton) -> Sequence[int]:
    """Of the latents that the UNet is made for. (Of a merged single file its readers assume them.)"""
    unet: Any = bones.unet
    size = unet.config.sample_size
    return [size] if isinstance(size, int) else size


def _predictions(bones: Skeleton, conditioning: Any, ids: Tensor, side: int) -> list[Tensor]:
    """``conditioning`` has the tokenizers, which a single file does not have; ``side`` is of the latents."""
    unet: Any = bones.unet
    text = replace(conditioning, encoders=bones.conditioning.encoders)
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(len(ids), unet.config.in_channels, side, side, generator=generator)
    pixels = float(side * bones.factor)
    frames = torch.tensor([[pixels, pixels, 0.0, 0.0, pixels, pixels]]).repeat(len(ids), 1)
    with torch.inference_mode():
        told = text.arguments(text.encode(ids), frames, torch.float32)
        return [unet(noisy, torch.tensor(TIMESTEPS), **told).sample]

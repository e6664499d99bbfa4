"""What a merged Stable Diffusion predicts beside base + adapter: the noise of a few prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters.merging.base import OpenBase
from lorakit.adapters.merging.outputs import Comparison, difference, side_by_side
from lorakit.adapters.merging.parallel import Crew
from lorakit.adapters.merging.plan import PlannedAdapter
from lorakit.adapters.merging.reference import parameters_on_meta, run_from_files
from lorakit.adapters.merging.source import Source
from lorakit.errors import ModelError
from lorakit.families.sd.base import load_conditioning
from lorakit.families.sd.conditioning import conditioning_of, ids_of
from lorakit.families.sd.original import open_stable_diffusion
from lorakit.families.sd.skeleton import Skeleton, skeleton
from lorakit.storage.bases import BaseLocation, resolve

PROMPTS = ("a photo of a red fox in the snow", "a castle by the sea, oil on canvas", "")
TIMESTEPS = (20, 500, 980)
"""One for each prompt."""
SIDE = 16
"""Of the latents at most: what they need in memory is to be little beside the weights'."""


def compare(
    base: BaseLocation,
    adapters: Sequence[PlannedAdapter],
    out: Path,
    sources: Mapping[str, Source] = {},
    crew: Crew | None = None,
) -> Comparison:
    """How far the merged model's prediction is from base + adapter's.

    In float32, a few rows of a weight in memory at a time. ``sources``: what to read the merged model's files through,
    by path.
    """
    text, ids, told = _prompts(base)
    location = resolve(str(out))
    crew = crew or Crew(0, None)
    merged = open_stable_diffusion(location).read_through(sources)
    one = _running(base, open_stable_diffusion(base).told(crew.go_on), adapters, merged)
    other = _running(location, merged)
    side = min(SIDE, *_sides(one))
    twice = torch.cat([ids, ids])
    expected, rounded, found = side_by_side(
        crew,
        lambda: [*_prediction(one, text, twice, side).chunk(2)],
        lambda: [_prediction(other, text, ids, side)],
    )
    share, rounding = difference(expected, found), difference(expected, rounded)
    return Comparison(share, rounding, f"predictions for {told} differ by {share:.2%}")


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


def _running(
    location: BaseLocation, opened: OpenBase, adapters: Sequence[PlannedAdapter] = (), into: OpenBase | None = None
) -> Skeleton:
    bones = skeleton(location, torch.float32, parameters_on_meta())
    run_from_files(replace(opened, models=bones.adaptable), adapters, into)
    return bones


def _sides(bones: Skeleton) -> Sequence[int]:
    """Of the latents that the UNet is made for. (Of a merged single file its readers assume them.)"""
    unet: Any = bones.unet
    size = unet.config.sample_size
    return [size] if isinstance(size, int) else size


def _prediction(bones: Skeleton, conditioning: Any, ids: Tensor, side: int) -> Tensor:
    """[B, 4, side, side] for tokens ``ids`` [B, E, L], each three rows of which have the same noise. ``conditioning``
    has the tokenizers, which a single file does not have; ``side`` is of the latents."""
    unet: Any = bones.unet
    text = replace(conditioning, encoders=bones.conditioning.encoders)
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(len(TIMESTEPS), unet.config.in_channels, side, side, generator=generator)
    times = len(ids) // len(TIMESTEPS)
    pixels = float(side * bones.factor)
    frames = torch.tensor([[pixels, pixels, 0.0, 0.0, pixels, pixels]]).repeat(len(ids), 1)
    told = text.arguments(text.encode(ids), frames, torch.float32)
    prediction: Tensor = unet(noisy.repeat(times, 1, 1, 1), torch.tensor(TIMESTEPS * times), **told).sample
    return prediction

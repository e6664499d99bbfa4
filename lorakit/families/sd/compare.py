"""What a merged Stable Diffusion predicts beside base + adapter: the noise of a few prompts."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters.reference import difference, put_on
from lorakit.families.place import Place
from lorakit.families.sd.base import Parts, load_parts
from lorakit.families.sd.conditioning import ids_of
from lorakit.storage.bases import BaseLocation, resolve

PROMPTS = ("a photo of a red fox in the snow", "a castle by the sea, oil on canvas", "")
TIMESTEPS = (20, 500, 980)
PLACE = Place(torch.device("cpu"), torch.float32)


def compare(base: BaseLocation, adapters: Sequence[tuple[Path, float]], out: Path) -> tuple[float, str]:
    """How far the merged model's prediction is from base + adapter's, in float32, as a share of its spread; and in
    words. One model is in memory at a time.
    """
    parts = load_parts(base, PLACE)
    put_on(parts.adaptable, adapters)
    ids, tokenizers = ids_of(parts.conditioning, PROMPTS), parts.conditioning.tokenizers
    expected = _predictions(parts, ids)
    del parts
    gc.collect()
    found = _predictions(load_parts(resolve(str(out)), PLACE, tokenizers), ids)
    share = difference(expected, found)
    return share, f"predictions for {len(PROMPTS)} prompts differ by {share:.2%}"


def _predictions(parts: Parts, ids: Tensor) -> list[Tensor]:
    unet: Any = parts.unet
    size = unet.config.sample_size if isinstance(unet.config.sample_size, int) else min(unet.config.sample_size)
    side = min(size, 32)
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(len(ids), unet.config.in_channels, side, side, generator=generator)
    pixels = float(side * parts.factor)
    frames = torch.tensor([[pixels, pixels, 0.0, 0.0, pixels, pixels]]).repeat(len(ids), 1)
    with torch.inference_mode():
        told = parts.conditioning.arguments(parts.conditioning.encode(ids), frames, torch.float32)
        return [unet(noisy, torch.tensor(TIMESTEPS), **told).sample]

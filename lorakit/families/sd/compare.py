"""What a merged Stable Diffusion predicts beside base + adapter: the noise of a few prompts."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.adapters.reference import difference, put_on
from lorakit.families.place import Place
from lorakit.families.sd.base import Parts, load_parts, text_states, token_ids
from lorakit.storage.bases import BaseLocation, resolve

PROMPTS = ("a photo of a red fox in the snow", "a castle by the sea, oil on canvas", "")
TIMESTEPS = (20, 500, 980)
PLACE = Place(torch.device("cpu"), torch.float32)


def compare(base: BaseLocation, adapters: Sequence[tuple[Path, float]], out: Path) -> tuple[float, str]:
    """How far the merged model's prediction is from base + adapter's, in float32, as a share of its spread; and in
    words. One model is in memory at a time.
    """
    parts = load_parts(base, PLACE)
    modules: dict[str, nn.Module] = {"unet": parts.unet, "text_encoder": parts.text_encoder}
    put_on(modules, adapters)
    tokenizer = parts.tokenizer
    ids = token_ids(tokenizer, PROMPTS)
    expected = _predictions(parts, ids)
    del modules, parts
    gc.collect()
    found = _predictions(load_parts(resolve(str(out)), PLACE, tokenizer), ids)
    share = difference(expected, found)
    return share, f"predictions for {len(PROMPTS)} prompts differ by {share:.2%}"


def _predictions(parts: Parts, ids: Tensor) -> list[Tensor]:
    config = cast(Any, parts.unet).config
    size = config.sample_size if isinstance(config.sample_size, int) else min(config.sample_size)
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(len(ids), config.in_channels, *[min(size, 32)] * 2, generator=generator)
    with torch.inference_mode():
        states = text_states(parts.text_encoder, ids)
        return [cast(Any, parts.unet)(noisy, torch.tensor(TIMESTEPS), states).sample]

"""Pictures from prompts: a base, any number of adapters, a scheduler by name.

Legend: B prompts at once, C latent channels, H and W latent height and width.
"""

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lorakit.adapters.pieces import identity
from lorakit.errors import NonFiniteError, RecipeError
from lorakit.families.place import Place
from lorakit.families.sd.attention import text_once
from lorakit.families.sd.base import Parts, from_latents
from lorakit.families.sd.conditioning import ids_of, unread
from lorakit.families.sd.drawing import NOISE, SCHEDULERS, UNSCALED, DrawSettings
from lorakit.families.sd.stored import load_with
from lorakit.families.sd.walk import Walk, can_walk
from lorakit.numerics.diffusion import guide
from lorakit.storage.bases import BaseLocation, base_id
from lorakit.storage.foreign import model_errors

logger = logging.getLogger("lorakit")

SYNTAX = re.compile(
    r"<(?:lora|lyco|hypernet):[^>]*>"
    r"|[(\[][^()\[\]]*[^()\[\]\s\d]\s*:\s*-?\d+\s*[)\]]"
    r"|[(\[][^()\[\]]*:\s*-?\d*\.\d+\s*[)\]]"
    r"|(?:^|\s)--[a-z]\s+\S+"
)
"""Weights and adapters as AUTOMATIC1111 and others take them in a prompt, options as kohya's scripts do."""
PIXELS_AT_ONCE = 2**19
"""Pictures are drawn together up to so many pixels, at least one and at most 16."""


def open_painter(
    location: BaseLocation,
    adapters: Sequence[tuple[Path, float]],
    device: torch.device,
    dtype: torch.dtype,
) -> "Painter":
    """Load a base with adapters in its weights, each with its own weight, as the merged model has them.

    Raises: ModelError when the base does not load, or an adapter does not fit it.
    """
    parts = load_with(location, adapters, Place(device, dtype))
    return Painter(parts, base_id(location), [identity(path, weight) for path, weight in adapters])


class Painter:
    """Draws with the modules it is given, adapters and all, as they are when it first draws."""

    def __init__(self, parts: Parts, base: str, adapters: Sequence[Mapping[str, Any]]) -> None:
        self.parts = parts
        self.base = base
        self.adapters = list(adapters)
        parameter = next(parts.unet.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    def draw(self, prompts: Sequence[str], settings: DrawSettings) -> list[tuple[Image.Image, dict[str, Any]]]:
        """``settings.count`` pictures for each prompt, each with the settings that draw it again, as ``paint`` does."""
        return list(self.paint(self.jobs(prompts, settings), settings))

    def jobs(self, prompts: Sequence[str], settings: DrawSettings) -> list[tuple[str, int]]:
        """Prompt and seed of each picture."""
        return [(prompt, settings.seed + i) for prompt in prompts for i in range(settings.count)]

    def paint(
        self, jobs: Sequence[tuple[str, int]], settings: DrawSettings
    ) -> Iterator[tuple[Image.Image, dict[str, Any]]]:
        """A picture for each prompt and seed, with the settings that draw it again, as they are finished.

        A picture's noise follows from its seed alone. A prompt longer than the text encoder reads gives a warning with
        the part that is lost, and one in other programs' syntax too.
        Raises: RecipeError for settings out of bounds, NonFiniteError when latents are not finite.
        """
        settings.check(self.parts.size, self.parts.factor)
        self._warn([*(prompt for prompt, _ in jobs), settings.negative_prompt])
        width, height = settings.size(self.parts.size)
        at_once = max(1, min(16, PIXELS_AT_ONCE // (width * height)))
        training = [module for module in self.parts.adaptable.values() if module.training]
        for module in training:
            module.eval()
        try:
            for start in range(0, len(jobs), at_once):
                chosen = jobs[start : start + at_once]
                latents = self._denoise([p for p, _ in chosen], [s for _, s in chosen], settings)
                drawn = self._decode(latents, [seed for _, seed in chosen])
                for (prompt, seed), picture in zip(chosen, drawn, strict=True):
                    yield picture, self.metadata(prompt, seed, settings)
        finally:
            for module in training:
                module.train()

    @torch.no_grad()
    def _denoise(self, prompts: Sequence[str], seeds: Sequence[int], settings: DrawSettings) -> Tensor:
        """Latents, float32 [B, C, H, W], from each seed's noise."""
        scheduler = self._scheduler(settings.scheduler)
        scheduler.set_timesteps(settings.steps)  # on the CPU, where a step that looks into them waits for no GPU
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # Karras' sigmas may have the first timestep twice, and it is looked for
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        width, height = settings.size(self.parts.size)
        channels = cast(Any, self.parts.unet).config.in_channels
        shape = (1, channels, height // self.parts.factor, width // self.parts.factor)
        noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
        latents: Tensor = noise.to(self.device) * scheduler.init_noise_sigma
        guided = settings.guidance_scale > 1
        texts = [*([settings.negative_prompt] * len(prompts) if guided else []), *prompts]
        conditioning = self.parts.conditioning
        text = conditioning.encode(ids_of(conditioning, texts).to(self.device))
        frames = torch.tensor([[height, width, 0, 0, height, width]] * len(texts), device=self.device).float()
        told = conditioning.arguments(text, frames, self.dtype)
        step = scheduler.step
        if "generator" in inspect.signature(step).parameters:
            step = partial(step, generator=generators)
        with self._predictor(scheduler.timesteps.to(self.device), told) as predict:
            for number, t in enumerate(scheduler.timesteps):
                predicted = predict(scheduler.scale_model_input(latents, t).to(self.dtype), number).float()
                if guided:
                    unconditional, conditional = predicted.chunk(2)
                    predicted = guide(unconditional, conditional, settings.guidance_scale)
                latents = step(predicted, t, latents, return_dict=False)[0]
        return latents

    @contextmanager
    def _predictor(self, timesteps: Tensor, told: dict[str, Any]) -> Iterator[Callable[[Tensor, int], Tensor]]:
        """What predicts from latents [B, C, H, W] at a step's number, for B texts or several times B in every step."""
        if self._walk is not None:
            yield self._walk.start(timesteps, **told)
            return
        unet, texts = self.parts.unet, len(told["encoder_hidden_states"])

        def predict(latents: Tensor, number: int) -> Tensor:
            repeated = torch.cat([latents] * (texts // len(latents)))
            return cast(Tensor, unet(repeated, timesteps[number], **told, return_dict=False)[0])

        with text_once(unet):
            yield predict

    @cached_property
    def _walk(self) -> Walk | None:
        return Walk(self.parts.unet) if can_walk(self.parts.unet) else None

    @torch.no_grad()
    def _decode(self, latents: Tensor, seeds: Sequence[int]) -> list[Image.Image]:
        for latent, seed in zip(latents, seeds, strict=True):
            if not torch.isfinite(latent).all():
                hint = "lower the guidance scale or an adapter's weight, or use fp32"
                raise NonFiniteError(f"the latents of seed {seed} are not finite", hint=hint)
        vae = self.parts.vae
        parts = latents[:, None] if self.device.type == "cuda" else latents[None]  # a GPU's memory is scarcer
        decoded = [vae.decode(from_latents(vae, part.float()), return_dict=False)[0].cpu() for part in parts]
        scaled = (torch.cat(decoded) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(picture) for picture in (scaled * 255).round().astype(np.uint8)]

    def _scheduler(self, name: str | None) -> Any:
        """The named scheduler over the base's own noise schedule and prediction type."""
        schedule = dict(self.parts.schedule)
        if name in UNSCALED and schedule.get("rescale_betas_zero_snr"):
            others = ", ".join(other for other in SCHEDULERS if other not in UNSCALED)
            reason = f"{name} has no schedule that ends in noise alone, which this base was trained on"
            raise RecipeError(reason, where="scheduler", hint=f"one of {others}")
        kind, options = (schedule["_class_name"], {}) if name is None else SCHEDULERS[name]
        if name is not None:
            schedule = {key: schedule[key] for key in NOISE if key in schedule}
        with model_errors(self.base, "its scheduler cannot be made"):
            return getattr(diffusers, kind).from_config(schedule, **options)

    def metadata(self, prompt: str, seed: int, settings: DrawSettings) -> dict[str, Any]:
        """What is kept in a picture's file: all that draws it again."""
        width, height = settings.size(self.parts.size)
        return {
            "prompt": prompt,
            "negative_prompt": settings.negative_prompt,
            "steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "width": width,
            "height": height,
            "seed": seed,
            "scheduler": settings.scheduler or self.parts.schedule["_class_name"],
            "base": self.base,
            "precision": str(self.dtype).removeprefix("torch."),
            "adapters": self.adapters,
        }

    def _warn(self, prompts: Sequence[str]) -> None:
        for prompt in dict.fromkeys(prompts):
            if found := SYNTAX.search(prompt):
                logger.warning("%r is read as words: prompts have no weights, adapters or options here", found[0])
            if lost := unread(self.parts.conditioning, prompt):
                room = self.parts.conditioning.tokenizers[0].model_max_length - 2
                logger.warning("the prompt is longer than %d tokens; its end is not read: %r", room, lost)

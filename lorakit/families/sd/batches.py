"""Examples -> noisy latents, targets and text: the micro-batches of training and of the held-out loss.

Legend: n pictures of one size, C latent channels, H and W latent height and width, L tokens, T training timesteps.
All of an example's randomness follows from its ``Draw.seed``, so it does not depend on which rank or micro-batch it
falls to.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Self

import torch
from torch import Tensor

from lorakit.data.captions import shuffle_tags
from lorakit.families.sd.base import to_latents
from lorakit.families.sd.conditioning import Text
from lorakit.families.sd.prepare import Example, Examples
from lorakit.numerics import diffusion
from lorakit.numerics.order import Draw, Layout, micro_batches, mix
from lorakit.recipe.schema import Diffusion, PictureData

TIMESTEPS = 8
"""How many timesteps a held-out picture is judged at."""


@dataclass(frozen=True)
class Group:
    """Pictures of one size in one micro-batch."""

    noisy: Tensor
    """x_t, float32 [n, C, H, W]."""
    timesteps: Tensor
    """int64 [n]."""
    target: Tensor
    """What the UNet should predict, float32 [n, C, H, W]."""
    weight: Tensor
    """Factor of each picture's squared error, float32 [n]."""
    frames: Tensor
    """How each picture was cut, float32 [n, 6], as ``Conditioning.arguments`` has it."""
    text: Text
    """Encoded captions, or their ``ids`` where the text encoders are trained."""

    def to(self, device: torch.device) -> Self:
        return type(self)(
            noisy=self.noisy.to(device, non_blocking=True),
            timesteps=self.timesteps.to(device, non_blocking=True),
            target=self.target.to(device, non_blocking=True),
            weight=self.weight.to(device, non_blocking=True),
            frames=self.frames.to(device, non_blocking=True),
            text={name: tensor.to(device, non_blocking=True) for name, tensor in self.text.items()},
        )


@dataclass
class SDBatch:
    """One micro-batch; ``count`` pictures over all sizes."""

    groups: tuple[Group, ...]
    count: int
    ids: tuple[str, ...]

    def to(self, device: torch.device) -> Self:
        return type(self)(tuple(group.to(device) for group in self.groups), self.count, self.ids)


@dataclass(frozen=True)
class Drawn:
    """One noisy example: tensors [C, H, W], and the caption it goes with."""

    example: Example
    noisy: Tensor
    target: Tensor
    timestep: int
    weight: float
    caption: str


class BatchMaker:
    """Turns examples into micro-batches. ``text``: captions to what a batch carries of them."""

    def __init__(
        self,
        examples: Examples,
        schedule: tuple[Tensor, diffusion.PredictionType],
        vae: Any,
        settings: tuple[PictureData, Diffusion],
        text: Callable[[Sequence[str]], Text],
    ) -> None:
        self.examples = examples
        self.alphas, self.kind = schedule
        self.vae = vae
        self.data, self.diffusion = settings
        self.text = text

    def train(self, layout: Layout, start: int) -> Iterator[SDBatch]:
        """This rank's micro-batches from optimizer step ``start`` on, endless."""
        keys = [example.bucket for example in self.examples.train]
        for draws in micro_batches(layout, keys, start):
            drawn = [self.draw(draw) for draw in draws]
            yield self._batch(drawn, len(drawn))

    def held_out(self, layout: Layout) -> Iterator[SDBatch]:
        """Each held-out picture at ``TIMESTEPS`` timesteps, dealt to the ranks; all ranks yield equally many batches.

        A rank without a picture left repeats one with weight 0, so that all ranks run the model equally often.
        """
        size = layout.micro_batch
        ordered = sorted(self.examples.held_out, key=lambda e: (e.bucket, e.key))
        rows = [(example, part) for example in ordered for part in range(TIMESTEPS)]
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        rounds = -(-len(chunks) // layout.world)
        for number in range(rounds):
            place = number * layout.world + layout.rank
            there = place < len(chunks)
            chosen = chunks[place] if there else chunks[-1]
            drawn = [self.fixed(example, part, 1.0 if there else 0.0) for example, part in chosen]
            yield self._batch(drawn, len(drawn) if there else 0)

    def draw(self, draw: Draw) -> Drawn:
        """A training example with fresh noise, timestep, latent sample and caption, all from ``draw.seed``."""
        example = self.examples.train[draw.index]
        generator = torch.Generator().manual_seed(draw.seed)
        dropped = bool(torch.rand((), generator=generator) < self.data.caption_dropout)
        timestep = int(torch.randint(len(self.alphas), (), generator=generator))
        weight = 1.0
        if self.diffusion.min_snr_gamma:
            snr = diffusion.signal_to_noise(self.alphas, torch.tensor([timestep]))
            weight = float(diffusion.min_snr_weights(self.kind, snr, self.diffusion.min_snr_gamma))
        caption = "" if dropped else example.caption
        if self.data.shuffle_tags and caption:
            keep = self.data.keep_tags + (self.data.trigger.count(",") + 1 if self.data.trigger else 0)
            caption = shuffle_tags(caption, keep, torch.Generator().manual_seed(mix(draw.seed, 1)))
        noisy, target = self._noisy(example, timestep, self.diffusion.noise_offset, generator)
        return Drawn(example, noisy, target, timestep, weight, caption)

    def fixed(self, example: Example, part: int, weight: float) -> Drawn:
        """A held-out example whose noise and timestep depend on the picture and ``part`` only."""
        number = int(example.content[:15], 16)
        offset = torch.rand((), generator=torch.Generator().manual_seed(mix(number)), dtype=torch.float64)
        timestep = int(diffusion.stratified_timesteps(TIMESTEPS, len(self.alphas), float(offset))[part])
        generator = torch.Generator().manual_seed(mix(number, part))
        noisy, target = self._noisy(example, timestep, 0.0, generator)
        return Drawn(example, noisy, target, timestep, weight, example.caption)

    def _noisy(
        self, example: Example, timestep: int, noise_offset: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Latents with noise, and what is to be predicted from them: [C, h, w] each."""
        posterior = self.examples.latents.read(example.key)
        mean, deviation = posterior["mean"][None], posterior["deviation"][None]
        sample, noise = (torch.randn(mean.shape, generator=generator) for _ in range(2))
        latents = to_latents(self.vae, mean + deviation * sample)
        if noise_offset:
            shift = torch.randn(1, mean.shape[1], 1, 1, generator=generator)
            noise = diffusion.offset_noise(noise, shift, noise_offset)
        steps = torch.tensor([timestep])
        noisy = diffusion.add_noise(latents, noise, self.alphas, steps)
        target = diffusion.target(self.kind, latents, noise, self.alphas, steps)
        return noisy[0], target[0]

    def _batch(self, drawn: Sequence[Drawn], count: int) -> SDBatch:
        ordered = sorted(drawn, key=lambda d: d.example.bucket)
        groups = tuple(self._group(list(same)) for _, same in groupby(ordered, key=lambda d: d.example.bucket))
        return SDBatch(groups, count, tuple(d.example.id for d in ordered) if count else ())

    def _group(self, drawn: Sequence[Drawn]) -> Group:
        return Group(
            noisy=torch.stack([d.noisy for d in drawn]),
            timesteps=torch.tensor([d.timestep for d in drawn]),
            target=torch.stack([d.target for d in drawn]),
            weight=torch.tensor([d.weight for d in drawn]),
            frames=torch.tensor([d.example.frame for d in drawn], dtype=torch.float32),
            text=self.text([d.caption for d in drawn]),
        )

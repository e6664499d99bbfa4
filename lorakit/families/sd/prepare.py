"""Pictures and captions -> cached latents and text states, computed once for equal inputs whatever the run."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.data.cache import TensorCache, checksum, content_key, default_folder
from lorakit.data.captions import with_trigger
from lorakit.data.images import Size, bucket_sizes, choose_bucket, decode, fit
from lorakit.data.pictures import Picture, Rejects, find_pictures
from lorakit.errors import DataError, RecipeError
from lorakit.families.sd.base import Parts, text_states, token_ids, vae_factor
from lorakit.numerics.order import Layout, mix
from lorakit.recipe.schema import PictureData

logger = logging.getLogger("lorakit")


@dataclass(frozen=True)
class Example:
    """One picture as it is trained on: its name, caption, content, and where its latents are cached."""

    id: str
    caption: str
    content: str
    """SHA-256 of the picture file."""
    key: str
    """Entry of the latents cache: ``mean`` and ``deviation``, float32 [C, H, W]."""
    bucket: int


@dataclass(frozen=True)
class Examples:
    """A data set, split in two. Every training picture stands there once; mirrored ones are examples of their own."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    buckets: tuple[Size, ...]
    latents: TensorCache

    @property
    def digest(self) -> str:
        """SHA-256 over what the examples are made of."""
        parts = [f"{e.key} {e.caption}" for e in (*self.train, *self.held_out)]
        return content_key(len(self.train), *parts)


def sizes_of(data: PictureData, factor: int) -> tuple[Size, ...]:
    """The sizes that pictures are brought to. Raises: RecipeError when they do not fit a VAE of ``factor``."""
    step = data.bucket_step if data.buckets else data.resolution
    if step % factor:
        field = "data.bucket_step" if data.buckets else "data.resolution"
        raise RecipeError(f"{step} is not a multiple of {factor}, the VAE's factor", where=field)
    sizes = bucket_sizes(data.resolution, step)
    if not sizes:
        raise RecipeError(f"no bucket of {step} pixels fits a resolution of {data.resolution}", where="data.resolution")
    return sizes if data.buckets else ((step, step),)


def held_out_ids(pictures: Sequence[Picture], share: float, seed: int) -> set[str]:
    """Which pictures are set aside: those whose name hashes lowest, so that adding others changes little.

    At least one when ``share`` is above 0 and there are two pictures; never all.
    """
    count = min(len(pictures) - 1, max(1, round(share * len(pictures)))) if share else 0
    ranked = sorted(pictures, key=lambda p: content_key(seed, p.id))
    return {p.id for p in ranked[:count]}


def prepare_examples(data: PictureData, vae: Any, layout: Layout) -> Examples:
    """Read every picture, cache what is not cached yet, and split.

    Ranks start at different places and skip what another has finished, so they share the work without waiting.
    Raises: DataError at the first bad picture, or with on_bad "skip" when none is left.
    """
    rejects = Rejects(data.on_bad)
    pictures = find_pictures(data, rejects)
    maker = _LatentMaker(data, vae, layout.seed)
    found: dict[int, list[tuple[str, str]]] = {}
    first = layout.rank * len(pictures) // layout.world
    for number in (*range(first, len(pictures)), *range(first)):
        try:
            found[number] = maker.entries(pictures[number])
        except DataError as error:
            rejects.report(error)
    if rejects.errors:
        listed = "; ".join(str(error) for error in rejects.errors[:20])
        logger.warning("%d pictures left out: %s", len(rejects.errors), listed)
    if not found:
        raise DataError("no picture can be used", where=data.path)
    kept = [pictures[number] for number in sorted(found)]
    aside = held_out_ids(kept, data.held_out, layout.seed)
    train: list[Example] = []
    held_out: list[Example] = []
    for number in sorted(found):
        made = [maker.example(pictures[number], content, key) for content, key in found[number]]
        if pictures[number].id in aside:
            held_out.append(made[0])
        else:
            train.extend(made * data.repeats)
    return Examples(tuple(train), tuple(held_out), maker.sizes, maker.cache)


class _LatentMaker:
    """Pictures to cached posteriors of one VAE under one recipe's transform."""

    def __init__(self, data: PictureData, vae: Any, seed: int) -> None:
        self.data = data
        self.vae = vae
        self.seed = seed
        self.factor = vae_factor(vae.config)
        self.sizes = sizes_of(data, self.factor)
        self.cache = TensorCache(default_folder() / "latents")
        self.vae_hash = checksum(dict(vae.state_dict()))

    def entries(self, picture: Picture) -> list[tuple[str, str]]:
        """(content hash, cache key) of a picture, and of its mirror image if asked; computes what is missing."""
        encoded = picture.read()
        content = sha256(encoded).hexdigest()
        x, y = 0.5, 0.5
        if self.data.crop == "random":
            number = mix(self.seed, 5, int(content[:15], 16))
            x, y = torch.rand(2, generator=torch.Generator().manual_seed(number), dtype=torch.float64).tolist()
        keys = []
        for mirror in (False, True) if self.data.flip else (False,):
            sizes = repr(self.sizes)
            key = content_key("latents 1", content, sizes, x, y, int(mirror), self.vae_hash, "float32")
            if not self.cache.holds(key):
                image = decode(encoded, picture.id)
                size = self.sizes[choose_bucket(image.size, self.sizes)]
                self.cache.write(key, self._encode(torch.from_numpy(fit(image, size, (x, y), mirror).copy())))
            keys.append((content, key))
        return keys

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """Mean and standard deviation of the posterior, float32 [C, H, W], for uint8 pixels [h, w, 3]."""
        scaled = pixels.to(self.vae.device).permute(2, 0, 1)[None].float() / 127.5 - 1
        posterior = self.vae.encode(scaled).latent_dist
        return {"mean": posterior.mean[0], "deviation": posterior.std[0]}

    def example(self, picture: Picture, content: str, key: str) -> Example:
        _, height, width = self.cache.read(key)["mean"].shape
        bucket = self.sizes.index((width * self.factor, height * self.factor))
        return Example(picture.id, with_trigger(picture.caption, self.data.trigger), content, key, bucket)


class TextStates:
    """Captions to the states of a frozen text encoder, cached by token ids and the encoder's weights."""

    def __init__(self, parts: Parts, cached: bool) -> None:
        self.tokenizer = parts.tokenizer
        self.text_encoder: nn.Module = parts.text_encoder
        self.cached = cached
        parameter = next(self.text_encoder.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.cache = TensorCache(default_folder() / "text")
        self.encoder_hash = checksum(dict(self.text_encoder.state_dict())) if cached else ""

    def fill(self, captions: Sequence[str]) -> None:
        """Compute what the cache lacks."""
        for caption in dict.fromkeys(captions):
            ids = token_ids(self.tokenizer, [caption])
            key = self._key(ids)
            if not self.cache.holds(key):
                self.cache.write(key, {"states": self._encode(ids)[0]})

    def states(self, captions: Sequence[str]) -> Tensor:
        """States [B, L, width] on the CPU when cached, else on the encoder's device."""
        ids = token_ids(self.tokenizer, captions)
        if not self.cached:
            return self._encode(ids)
        return torch.stack([self.cache.read(self._key(row[None]))["states"] for row in ids])

    def _key(self, ids: Tensor) -> str:
        return content_key("text 1", ids.numpy().tobytes(), self.encoder_hash, str(self.dtype))

    @torch.no_grad()
    def _encode(self, ids: Tensor) -> Tensor:
        return text_states(self.text_encoder, ids.to(self.device))

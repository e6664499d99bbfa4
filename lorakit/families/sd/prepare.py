"""Pictures and captions -> cached latents and text states, computed once for equal inputs whatever the run."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.data.arrange import held_out_ids, repeats
from lorakit.data.cache import TensorCache, checksum, content_key, default_folder
from lorakit.data.captions import with_trigger
from lorakit.data.images import Size, choose_bucket, cut_out, decode, fit, read_size
from lorakit.data.pictures import Picture, find_pictures
from lorakit.data.records import Rejects
from lorakit.errors import DataError
from lorakit.families.sd.base import Parts
from lorakit.families.sd.conditioning import Text, ids_of
from lorakit.numerics.order import Layout, mix
from lorakit.recipe.schema import PictureData
from lorakit.storage.fingerprint import Fingerprint, row_hash

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
    frame: tuple[int, ...]
    """How it was cut: height and width before scaling, top and left, height and width after, in pixels."""


@dataclass(frozen=True)
class Examples:
    """A data set, split in two. A training picture stands there as often as it is repeated; mirrored ones are
    examples of their own."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    buckets: tuple[Size, ...]
    latents: TensorCache

    def fingerprint(self) -> Fingerprint:
        """Every picture's name, and a hash of its latents' key and its caption."""
        return Fingerprint(
            *([(e.id, row_hash(e.key, e.caption)) for e in part] for part in (self.train, self.held_out))
        )


def prepare_examples(data: PictureData, vae: Any, sizes: tuple[Size, ...], layout: Layout) -> Examples:
    """Read every picture, bring it to one of ``sizes``, cache what is not cached yet, and split.

    Ranks start at different places and skip what another has finished, so they share the work without waiting.
    Raises: DataError at the first bad picture, or with on_bad "skip" when none is left.
    """
    rejects = Rejects(data.on_bad)
    pictures = find_pictures(data, rejects)
    maker = _LatentMaker(data, vae, sizes, layout.seed)
    found: dict[int, list[_Entry]] = {}
    first = layout.rank * len(pictures) // layout.world
    for number in (*range(first, len(pictures)), *range(first)):
        try:
            found[number] = maker.entries(pictures[number])
        except DataError as error:
            rejects(error)
    if rejects.errors:
        listed = "; ".join(str(error) for error in rejects.errors[:20])
        logger.warning("%d pictures left out: %s", len(rejects.errors), listed)
    if not found:
        raise DataError("no picture can be used", where=data.path, hint=rejects.first())
    kept = [pictures[number] for number in sorted(found)]
    aside = held_out_ids(kept, data.held_out, layout.seed)
    train: list[Example] = []
    held_out: list[Example] = []
    for number in sorted(found):
        made = [maker.example(pictures[number], entry) for entry in found[number]]
        if pictures[number].id in aside:
            held_out.append(made[0])
        else:
            train.extend(made * repeats(data, pictures[number]))
    shown_too = {example.content for example in held_out} & {example.content for example in train}
    if shown_too:
        logger.warning(
            "%d held-out pictures are trained on under other names, which flatters their loss", len(shown_too)
        )
    return Examples(tuple(train), tuple(held_out), maker.sizes, maker.cache)


class _Entry(NamedTuple):
    """One picture, or its mirror image, in the cache."""

    content: str
    key: str
    bucket: int
    frame: tuple[int, ...]


class _LatentMaker:
    """Pictures to cached posteriors of one VAE under one recipe's transform."""

    def __init__(self, data: PictureData, vae: Any, sizes: tuple[Size, ...], seed: int) -> None:
        self.data = data
        self.vae = vae
        self.seed = seed
        self.sizes = sizes
        self.cache = TensorCache(default_folder() / "latents")
        self.vae_hash = checksum(dict(vae.state_dict()))

    def entries(self, picture: Picture) -> list[_Entry]:
        """A picture, and its mirror image if asked; computes what the cache lacks."""
        encoded = picture.read()
        content = sha256(encoded).hexdigest()
        x, y = 0.5, 0.5
        if self.data.crop == "random":
            number = mix(self.seed, 5, int(content[:15], 16))
            x, y = torch.rand(2, generator=torch.Generator().manual_seed(number), dtype=torch.float64).tolist()
        size = read_size(encoded, picture.id)
        bucket = choose_bucket(size, self.sizes)
        entries = []
        for mirror in (False, True) if self.data.flip else (False,):
            sizes = repr(self.sizes)
            key = content_key("latents 1", content, sizes, x, y, int(mirror), self.vae_hash, "float32")
            if not self.cache.holds(key):
                pixels = fit(decode(encoded, picture.id), self.sizes[bucket], (x, y), mirror)
                self.cache.write(key, self._encode(torch.from_numpy(pixels.copy())))
            entries.append(_Entry(content, key, bucket, cut_out(size, self.sizes[bucket], (x, y), mirror)))
        return entries

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """Mean and standard deviation of the posterior, float32 [C, H, W], for uint8 pixels [h, w, 3]."""
        scaled = pixels.to(self.vae.device).permute(2, 0, 1)[None].float() / 127.5 - 1
        posterior = self.vae.encode(scaled).latent_dist
        return {"mean": posterior.mean[0], "deviation": posterior.std[0]}

    def example(self, picture: Picture, entry: _Entry) -> Example:
        caption = with_trigger(picture.caption, self.data.trigger)
        return Example(picture.id, caption, entry.content, entry.key, entry.bucket, entry.frame)


class TextStates:
    """Captions to what frozen text encoders make of them, cached by token ids and the encoders' weights."""

    def __init__(self, parts: Parts, cached: bool) -> None:
        self.conditioning = parts.conditioning
        self.cached = cached
        encoders = self.conditioning.encoders
        parameter = next(next(iter(encoders.values())).parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.cache = TensorCache(default_folder() / "text")
        weights = {f"{name}.{key}": t for name, m in encoders.items() for key, t in m.state_dict().items()}
        self.encoder_hash = checksum(weights) if cached else ""

    def fill(self, captions: Sequence[str]) -> None:
        """Compute what the cache lacks."""
        for caption in dict.fromkeys(captions):
            ids = ids_of(self.conditioning, [caption])
            key = self._key(ids)
            if not self.cache.holds(key):
                self.cache.write(key, {name: tensor[0] for name, tensor in self._encode(ids).items()})

    def states(self, captions: Sequence[str]) -> Text:
        """Captions encoded, on the CPU when cached, else on the encoders' device."""
        ids = ids_of(self.conditioning, captions)
        if not self.cached:
            return self._encode(ids)
        rows = [self.cache.read(self._key(row[None])) for row in ids]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _key(self, ids: Tensor) -> str:
        return content_key("text 2", ids.numpy().tobytes(), self.conditioning.kind, self.encoder_hash, str(self.dtype))

    @torch.no_grad()
    def _encode(self, ids: Tensor) -> Text:
        return self.conditioning.encode(ids.to(self.device))

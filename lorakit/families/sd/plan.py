"""What a Stable Diffusion recipe would do, worked out without reading any weights: models on the meta device."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from lorakit.adapters.inject import inject
from lorakit.adapters.targets import Target
from lorakit.data.images import Size, choose_bucket, read_size
from lorakit.data.pictures import Picture, Rejects, find_pictures
from lorakit.errors import DataError
from lorakit.families.place import Place
from lorakit.families.sd.base import find_base, native_size, noise_schedule, read_schedule, vae_factor
from lorakit.families.sd.conditioning import Conditioning, conditioning_of
from lorakit.families.sd.prepare import held_out_ids, sizes_of
from lorakit.families.sd.single_file import make_encoders, read_configs
from lorakit.families.sd.targets import split_adapter
from lorakit.numerics.order import Layout
from lorakit.recipe.schema import PictureData, SDAdapter, SDBase
from lorakit.storage.bases import BaseLocation
from lorakit.storage.checks import read_json, weight_stems
from lorakit.storage.foreign import model_errors


@dataclass(frozen=True)
class SDPlan:
    """What ``load`` and training would make of a recipe."""

    modules: tuple[Target, ...]
    """The layers that get LoRA, their component in front, with features in and out and rank."""
    total_parameters: int
    """Of the base: UNet, text encoder and VAE."""
    trainable_parameters: int
    memory: dict[str, int]
    """Estimated bytes by component. ``gradients`` and the optimizer's state go by ``trainable_parameters``."""
    pictures: int
    """Examples of one epoch: training pictures, mirrored ones and repeats counted."""
    held_out: int
    buckets: dict[Size, int]
    """Examples of one epoch by size (width, height) in pixels; empty sizes left out."""
    notes: tuple[str, ...]
    """Pictures that on_bad "skip" leaves out, as far as their headers tell."""
    steps_per_epoch: float

    @property
    def examples(self) -> str:
        """What is learned from, in one line."""
        sizes = ", ".join(f"{width}x{height}: {count}" for (width, height), count in sorted(self.buckets.items()))
        return f"{self.pictures} pictures an epoch, {self.held_out} held out; sizes {sizes}"


@dataclass(frozen=True)
class Skeleton:
    """A base's modules on the meta device."""

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


def skeleton(location: BaseLocation, dtype: torch.dtype) -> Skeleton:
    """Raises: ModelError when a config does not make a model."""
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
        with torch.device("meta"):
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


def plan(base: SDBase, adapter: SDAdapter, data: PictureData, layout: Layout, place: Place) -> SDPlan:
    """Raises what ``load`` would raise, but for weights and pixels that cannot be read."""
    location = find_base(base)
    bones = skeleton(location, place.dtype)
    noise_schedule(bones.schedule, location.name)
    modules = bones.adaptable
    total = sum(p.numel() for m in (*modules.values(), bones.vae) for p in m.parameters())
    weights = sum(p.numel() * p.element_size() for m in (*modules.values(), bones.vae) for p in m.parameters())
    targets: list[Target] = []
    for component, (section, groups) in split_adapter(adapter, modules).items():
        found = inject(modules[component], section, groups, seed=0).targets
        targets.extend(target._replace(name=f"{component}.{target.name}") for target in found)
    trainable = sum(p.numel() for m in modules.values() for p in m.parameters() if p.requires_grad)
    sizes = sizes_of(data, bones.factor, bones.size)
    counts, held_out, rejects = _count(data, sizes, layout.seed)
    largest = max(counts, key=lambda size: size[0] * size[1])
    activations = _activation_bytes(bones, largest, layout.micro_batch, place)
    memory = {
        "base weights": weights,
        "adapter": 4 * trainable,
        "gradients": 4 * trainable,
        "activations": activations,
    }
    pictures = sum(counts.values())
    return SDPlan(
        modules=tuple(targets),
        total_parameters=total,
        trainable_parameters=trainable,
        memory=memory,
        pictures=pictures,
        held_out=held_out,
        buckets=dict(counts),
        notes=tuple(str(error) for error in rejects.errors),
        steps_per_epoch=pictures / layout.batch_size,
    )


def _count(data: PictureData, sizes: tuple[Size, ...], seed: int) -> tuple[Counter[Size], int, Rejects]:
    """Examples of one epoch by size, and held-out pictures, from the pictures' headers."""
    rejects = Rejects(data.on_bad)
    found: list[tuple[Picture, Size]] = []
    for picture in find_pictures(data, rejects):
        try:
            found.append((picture, sizes[choose_bucket(read_size(picture.read(), picture.id), sizes)]))
        except DataError as error:
            rejects.report(error)
    if not found:
        raise DataError("no picture can be used", where=data.path)
    aside = held_out_ids([picture for picture, _ in found], data.held_out, seed)
    counts: Counter[Size] = Counter()
    for picture, size in found:
        if picture.id not in aside:
            counts[size] += data.repeats * (2 if data.flip else 1)
    return counts, sum(picture.id in aside for picture, _ in found), rejects


def _activation_bytes(bones: Skeleton, size: Size, batch: int, place: Place) -> int:
    """What the UNet's forward pass keeps for its backward pass, tensor by tensor, as autograd would save it."""
    unet: Any = bones.unet
    if place.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    weights = {p.untyped_storage()._cdata for p in unet.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no two storages share an address

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    config = unet.config
    shape = (batch, config.in_channels, size[1] // bones.factor, size[0] // bones.factor)
    encoders: list[Any] = list(bones.conditioning.encoders.values())
    tokens = encoders[0].config.max_position_embeddings
    with torch.device("meta"), torch.no_grad():
        text = bones.conditioning.encode(torch.zeros((batch, len(encoders), tokens), dtype=torch.int64))
        told = bones.conditioning.arguments(text, torch.zeros(batch, 6), place.dtype)
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        noisy = torch.zeros(shape, dtype=place.dtype)
        output = unet(noisy, torch.zeros(batch, dtype=torch.int64), **told).sample
    del output
    return sum(kept.values())

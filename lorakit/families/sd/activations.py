"""The memory of a training step's activations: a forward pass on the meta device, by what autograd saves of it."""

from typing import Any

import torch
from torch import Tensor

from lorakit.adapters.inject import inject
from lorakit.adapters.outline import adaptable
from lorakit.data.images import Size
from lorakit.families.place import Place
from lorakit.families.sd.skeleton import skeleton
from lorakit.families.sd.targets import split_adapter
from lorakit.recipe.schema import SDAdapter
from lorakit.storage.bases import BaseLocation

MANY = 1_000_003
"""Pictures in the batch that is looked at, which takes no memory: a prime, so that what grows with them is told by its
size from what does not."""


def activation_bytes(location: BaseLocation, adapter: SDAdapter, size: Size, place: Place) -> tuple[int, int]:
    """What the UNet's forward pass keeps for its backward pass, tensor by tensor, as autograd would save it: bytes a
    batch, and bytes a picture."""
    bones = skeleton(location, place.dtype)
    models = bones.adaptable
    for component, (section, groups) in split_adapter(adapter, {n: adaptable(m) for n, m in models.items()}).items():
        inject(models[component], section, groups, seed=0)
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
    shape = (MANY, config.in_channels, size[1] // bones.factor, size[0] // bones.factor)
    encoders: list[Any] = list(bones.conditioning.encoders.values())
    tokens = encoders[0].config.max_position_embeddings
    with torch.device("meta"), torch.no_grad():
        text = bones.conditioning.encode(torch.zeros((MANY, len(encoders), tokens), dtype=torch.int64))
        told = bones.conditioning.arguments(text, torch.zeros(MANY, 6), place.dtype)
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        noisy = torch.zeros(shape, dtype=place.dtype)
        output = unet(noisy, torch.zeros(MANY, dtype=torch.int64), **told).sample
    del output
    growing = sum(size for size in kept.values() if size % MANY == 0)
    return sum(kept.values()) - growing, growing // MANY

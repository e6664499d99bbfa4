"""A base with adapters in its weights, the merged model bit for bit: drawing makes much of small differences."""

from collections.abc import Sequence
from functools import reduce
from pathlib import Path

import torch
from torch import nn

from lorakit.adapters.files import read_adapter
from lorakit.adapters.inject import apply, fold
from lorakit.families.place import Place
from lorakit.families.sd.base import Parts, load_parts
from lorakit.families.sd.original import open_stable_diffusion
from lorakit.storage.bases import BaseLocation


def load_with(location: BaseLocation, adapters: Sequence[tuple[Path, float]], place: Place) -> Parts:
    """Load a base on ``place`` with each adapter added to its weights, ``weight`` times: float32 sums, rounded once to
    the dtype that the base's file has them in, as ``lorakit merge`` does. (A single file has the transpose of SDXL's
    ``text_projection``, where a merge's sums may be rounded otherwise.)

    Raises: ModelError when the base does not load, or an adapter does not fit it.
    """
    if not adapters:
        return load_parts(location, place)
    stored = stored_dtypes(location)
    widest = reduce(torch.promote_types, (dtype for names in stored.values() for dtype in names.values()))
    parts = load_parts(location, Place(torch.device("cpu"), widest))
    modules = parts.adaptable
    for number, (path, weight) in enumerate(adapters):
        for component, deltas in read_adapter(path, modules).components.items():
            apply(modules[component], deltas, weight=weight, name=f"adapter{number}")
    for component, module in modules.items():
        fold(module, stored[component])
        nn.Module.to(module, place.device, place.dtype)  # diffusers' own warns of modules to keep, and there are none
    parts.vae.to(place.device)
    return parts


def stored_dtypes(location: BaseLocation) -> dict[str, dict[str, torch.dtype]]:
    """What each weight of each component that can be adapted is in the base's file, by the module's own tensor name."""
    opened = open_stable_diffusion(location)
    found: dict[str, dict[str, torch.dtype]] = {}
    for component, model in opened.models.items():
        homes = {name: opened.home(component, name) for name in model.state_dict() if component != "vae"}
        slots = {name: opened.sources[home.file].slots[home.name] for name, home in homes.items() if home is not None}
        found[component] = {name: slot.dtype for name, slot in slots.items() if slot.dtype.is_floating_point}
    return found

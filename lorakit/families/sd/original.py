"""The original names of a single-file checkpoint's tensors, beside the diffusers names of what they become.

diffusers' own conversion is run on small tensors that say which tensor and which row they are, so the table is right
wherever the conversion is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from lorakit.adapters.merging.base import OpenBase, Original, Packed, open_folder, open_single
from lorakit.errors import ModelError
from lorakit.families.sd.kinds import Kind, kind_of
from lorakit.families.sd.single_file import load_tokenizers, rename
from lorakit.families.sd.skeleton import skeleton
from lorakit.storage.bases import BaseLocation
from lorakit.storage.headers import read_header

_KEY = 1 << 32
"""A row's mark is its tensor's number times this, plus the row's own number."""

_EARLY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What early versions of diffusers, and files that they wrote, call the layers of a VAE's attention."""


def open_original(location: BaseLocation) -> Original:
    """A checked single file's models, names, and what a diffusers folder holds beside the weights.

    Raises ModelError for a layout that is not SD 1.x, 2.x or XL; ``write_rest`` where CLIP's vocabulary is missing.
    """
    bones, kind = skeleton(location, torch.float32), kind_of(location.path)
    models: dict[str, Any] = {**bones.adaptable, "vae": bones.vae}
    shapes = {name: info.shape for name, info in read_header(location.path).tensors.items()}

    def write_rest(out: Path) -> None:
        tokenizers, encoders = load_tokenizers(location.path), bones.conditioning.encoders
        scheduler = getattr(diffusers, bones.schedule["_class_name"]).from_config(bones.schedule)
        for encoder in encoders.values():
            encoder.config.architectures = [type(encoder).__name__]  # type: ignore[union-attr]
        parts = {"vae": bones.vae, "unet": bones.unet, "scheduler": scheduler, **encoders, **tokenizers}
        getattr(diffusers, kind.pipeline)(**parts, **kind.options).save_config(out)
        for name in ("unet", "vae"):
            models[name].save_config(out / name)
        for name, encoder in encoders.items():
            encoder.config.save_pretrained(out / name)  # type: ignore[operator,union-attr]
        for name, part in (*tokenizers.items(), ("scheduler", scheduler)):
            part.save_pretrained(out / name)
        for name, tokenizer in tokenizers.items():  # older versions of transformers read nothing else of CLIP's
            tokenizer.backend_tokenizer.model.save(str(out / name))

    return Original(models, original_names(kind, shapes, models, location.name), write_rest)


def open_stable_diffusion(location: BaseLocation) -> OpenBase:
    """The headers of a folder or a single file, for a merge."""
    if location.layout == "single-file":
        return open_single(location, open_original(location))
    bones = skeleton(location, torch.float32)
    opened = open_folder(location, {**bones.adaptable, "vae": bones.vae})
    opened.homes["vae"] = {_renamed(name): home for name, home in opened.homes["vae"].items()}
    return opened


def _renamed(name: str) -> str:
    """A VAE's tensor as it is called today."""
    return ".".join(_EARLY.get(part, part) for part in name.split("."))


def original_names(
    kind: Kind, shapes: Mapping[str, tuple[int, ...]], models: Mapping[str, Any], where: str
) -> dict[str, Packed]:
    """What each tensor of a single file is made of, by its name in the file; those of no component are left out.

    Raises ModelError, with ``where``, when a model's tensor is not made of rows of one of the file's.
    """
    keys = [key for key, shape in shapes.items() if shape]
    marks = {
        key: (torch.arange(shapes[key][0]) + number * _KEY).reshape(-1, *[1] * (len(shapes[key]) - 1))
        for number, key in enumerate(keys)
    }
    rows: dict[str, list[tuple[int, str, str]]] = {}
    turned = set()
    for component, model in models.items():
        own = {key: mark for key, mark in marks.items() if key.startswith(kind.prefixes[component])}
        for name, mark in rename(kind, component, own, model).items():
            number, first = _place(mark, f"{component}.{name}", where)
            rows.setdefault(keys[number], []).append((first, component, name))
            if mark.dim() > 1 and mark.shape[0] == 1 < mark.numel():
                turned.add(keys[number])
    return {
        key: Packed(tuple((component, name) for _, component, name in sorted(parts)), shapes[key], key in turned)
        for key, parts in rows.items()
    }


def _place(mark: Tensor, name: str, where: str) -> tuple[int, int]:
    """The tensor's number and first row behind a mark whose rows follow one another."""
    flat = mark.flatten()
    first = int(flat[0])
    if not torch.equal(flat, torch.arange(first, first + len(flat))):
        raise ModelError(f"{name} is not made of rows that follow one another", where=where)
    return divmod(first, _KEY)

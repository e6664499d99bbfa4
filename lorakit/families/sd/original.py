"""The original names of a single-file checkpoint's tensors, beside the diffusers names of what they become.

diffusers' own conversion is run on small tensors that say which tensor and which row they are, so the table is right
wherever the conversion is.
"""

from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from lorakit.adapters.merge_base import Original
from lorakit.errors import ModelError
from lorakit.families.sd.plan import skeleton
from lorakit.families.sd.single_file import PREFIXES, load_tokenizer, read_configs, rename
from lorakit.storage.bases import BaseLocation
from lorakit.storage.headers import read_header

_KEY = 1 << 32
"""A row's mark is its tensor's number times this, plus the row's own number."""


def open_original(location: BaseLocation) -> Original:
    """A checked single file's models, names, and what a diffusers folder holds beside the weights.

    Raises ModelError for a layout that is not SD 1.x or 2.x; ``write_rest`` where CLIP's vocabulary is missing.
    """
    bones = skeleton(location, torch.float32)
    models: dict[str, Any] = {**bones.adaptable, "vae": bones.vae}
    shapes = {name: info.shape for name, info in read_header(location.path).tensors.items() if info.shape}
    keys = list(shapes)
    marks = {
        key: (torch.arange(shapes[key][0]) + number * _KEY).reshape(-1, *[1] * (len(shapes[key]) - 1))
        for number, key in enumerate(keys)
    }
    rows: dict[str, list[tuple[int, str, str]]] = {}
    for component, model in models.items():
        own = {key: mark for key, mark in marks.items() if key.startswith(PREFIXES[component])}
        for name, mark in rename(component, own, model).items():
            number, first = _place(mark, f"{component}.{name}", location)
            rows.setdefault(keys[number], []).append((first, component, name))
    names = {key: tuple((component, name) for _, component, name in sorted(parts)) for key, parts in rows.items()}

    def write_rest(out: Path) -> None:
        configs = read_configs(location.path)
        tokenizer = load_tokenizer(location.path, configs.text_encoder["vocab_size"])
        scheduler = getattr(diffusers, bones.schedule["_class_name"]).from_config(bones.schedule)
        text: Any = bones.conditioning.encoders["text_encoder"]
        text.config.architectures = [type(text).__name__]
        make: Any = diffusers.StableDiffusionPipeline
        pipeline = make(*(bones.vae, text, tokenizer, bones.unet, scheduler, None, None), requires_safety_checker=False)
        pipeline.save_config(out)
        for name in ("unet", "vae"):
            models[name].save_config(out / name)
        for name, part in (("text_encoder", text.config), ("tokenizer", tokenizer), ("scheduler", scheduler)):
            part.save_pretrained(out / name)

    return Original(models, names, write_rest)


def _place(mark: Tensor, name: str, location: BaseLocation) -> tuple[int, int]:
    """The tensor's number and first row behind a mark whose rows follow one another."""
    flat = mark.flatten()
    first = int(flat[0])
    if not torch.equal(flat, torch.arange(first, first + len(flat))):
        raise ModelError(f"{name} is not made of rows that follow one another", where=location.name)
    return divmod(first, _KEY)

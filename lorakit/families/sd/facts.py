"""What diffusers and transformers make of a base: kept once they have made it, as importing them takes seconds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.adapters.outline import Outline
from lorakit.data.cache import content_key, remembered, versions
from lorakit.data.images import Size
from lorakit.storage.bases import BaseLocation, description


@dataclass(frozen=True)
class Facts:
    outlines: Mapping[str, Outline]
    """Of the components that can have LoRA."""
    vae_parameters: int
    factor: int
    """Pixels of a picture's side for one of its latents' side."""
    size: Size
    """Width and height in pixels that the base was trained at."""

    @property
    def layers(self) -> dict[str, list[str]]:
        """The paths of the layers that can have LoRA, by component."""
        return {component: list(outline.layers) for component, outline in self.outlines.items()}


def identity(location: BaseLocation) -> str:
    """A key for what the libraries make of a base."""
    return content_key(description(location), versions("torch", "diffusers", "transformers", "peft"))


def facts_of(location: BaseLocation) -> Facts:
    """Raises: ModelError when a config does not make a model, the noise schedule cannot be trained with, or a text
    encoder, tokenizer or UNet does not fit the others."""

    def make() -> dict[str, Any]:
        import torch

        from lorakit.families.sd.base import load_conditioning, noise_schedule  # with diffusers
        from lorakit.families.sd.conditioning import check_widths
        from lorakit.families.sd.skeleton import skeleton

        bones = skeleton(location, torch.float32)
        noise_schedule(bones.schedule, location.name)
        check_widths(load_conditioning(location, bones.conditioning.encoders), bones.unet, location.name)
        return {
            "outlines": {name: Outline.of(model).as_table() for name, model in bones.adaptable.items()},
            "vae_parameters": Outline.of(bones.vae).parameters,
            "factor": bones.factor,
            "size": bones.size,
        }

    beside = location.layout == "single-file" and (location.path.parent / "tokenizer").is_dir()
    table = remembered("outlines", content_key("sd 2", identity(location), int(beside)), make)
    outlines = {name: Outline.from_table(outline) for name, outline in table["outlines"].items()}
    width, height = table["size"]
    return Facts(outlines, table["vae_parameters"], table["factor"], (width, height))

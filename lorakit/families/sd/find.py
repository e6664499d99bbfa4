"""Which base a recipe names."""

from lorakit.errors import ModelError
from lorakit.recipe.schema import SDBase
from lorakit.storage.bases import BaseLocation, resolve


def find_base(base: SDBase) -> BaseLocation:
    """The base that a recipe names. Raises ModelError, for a language model too."""
    location = resolve(base.model, base.revision)
    if location.family != "sd":
        raise ModelError(
            f"{location.name} is not a Stable Diffusion model",
            where="base.model",
            hint="lorakit train-llama trains those",
        )
    return location

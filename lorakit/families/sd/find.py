"""Which base a recipe names."""

from lorakit.errors import RecipeError
from lorakit.recipe.schema import SDBase
from lorakit.storage.bases import BaseLocation, resolve


def find_base(base: SDBase) -> BaseLocation:
    """The base that a recipe names. Raises: ModelError, or RecipeError for a language model."""
    location = resolve(base.model, base.revision)
    if location.family != "sd":
        raise RecipeError(
            f"{location.name} is not a Stable Diffusion model",
            where="base.model",
            hint="lorakit train-llama trains those",
        )
    return location

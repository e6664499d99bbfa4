"""``lorakit init``: a commented recipe to start from."""

from pathlib import Path
from typing import Literal

from lorakit.errors import ConflictError, ResourceError
from lorakit.recipe.schema import LlamaRecipe, SDRecipe
from lorakit.recipe.template import template


def init(kind: Literal["sd", "llama"], path: Path) -> Path:
    """Write the template of ``kind`` to ``path`` and return it.

    Raises ConflictError when something is there already, ResourceError when it cannot be written.
    """
    text = template(SDRecipe if kind == "sd" else LlamaRecipe)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConflictError("exists already", where=str(path), hint="Name another file, or remove this one.") from error
    except OSError as error:
        raise ResourceError(f"cannot be written: {error.strerror}", where=str(path)) from error
    return path

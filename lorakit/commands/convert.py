"""`lorakit convert`: an adapter from one format to another, compared with what was read."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lorakit.commands.adapters import AdapterBase, named_base, read_for
from lorakit.commands.progress import warnings_to

if TYPE_CHECKING:
    from lorakit.adapters.delta import SavedAdapter
    from lorakit.adapters.formats import Format


def run(adapter: Path, out: Path, to: "Format", base: str | None, dtype: str | None) -> None:
    """Convert, and print how far the result is from what was read."""
    import torch

    from lorakit.adapters.convert import check_out, convert
    from lorakit.adapters.pieces import open_pieces

    check_out(out, to)
    console = Console(stderr=True)
    with warnings_to(console):
        pieces = open_pieces(adapter)
        saved, found = read_for(adapter, pieces, base, pieces[0].format, to)
        done = convert(
            saved if found is None or saved.family == "llama" else _told(saved, found),
            out,
            to,
            models=None if found is None else found.models,
            base_name=(found.name if found else "") or named_base(pieces),
            dtype=None if dtype is None else getattr(torch, dtype),
        )
    print(f"{pieces[0].format} -> {done.format}: {done.modules} modules ({done.dtypes}) in {done.out}")
    print(f"read back: largest |dW_in - dW_out| {done.largest:.2e}, in {done.where}")


def _told(saved: "SavedAdapter", base: AdapterBase) -> "SavedAdapter":
    """With what a kohya file tells of training, where the adapter's metadata do not: what ``base`` predicts, and the
    resolution of the recipe."""
    from pydantic import ValidationError

    from lorakit.adapters.write import base_strings, version_of
    from lorakit.data.arrange import resolution_of
    from lorakit.recipe.schema import SDRecipe

    try:
        data = SDRecipe.model_validate_json(saved.metadata.get("lorakit_recipe", "")).data
        resolution = data.resolution if base.size is None else resolution_of(data, base.size)
    except ValidationError:  # none, or one of another version
        resolution = None
    return replace(saved, metadata=base_strings(version_of(base.models), base.predicts, resolution) | saved.metadata)

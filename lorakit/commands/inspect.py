"""`lorakit inspect`: what is in an adapter, and what it was made with."""

import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from lorakit.commands.adapters import find_base, made_for
from lorakit.commands.data import visible
from lorakit.errors import LorakitError, ModelError, RecipeError

if TYPE_CHECKING:
    from torch import nn

    from lorakit.adapters.describe import Description
    from lorakit.adapters.pieces import Piece

SHOWN = 20
"""Dead, broken and unfitting modules that are listed, of each; the others are counted."""
LONG = 100
"""Characters of a metadata string that are shown."""


def run(adapter: Path, base: str | None, *, as_json: bool, recipe: bool) -> None:
    """Print a description, as a table or as JSON, or the recipe that made the adapter."""
    from lorakit.adapters.describe import describe, unfit
    from lorakit.adapters.pieces import open_pieces

    for option, given in (("--json", as_json), ("--base", base is not None)):
        if recipe and given:
            raise RecipeError(f"--recipe and {option} do not go together", hint=f"leave {option} out")
    pieces = open_pieces(adapter)
    if recipe:
        print(_recipe(pieces, adapter), end="")
        return
    models = _models(pieces, base)
    found, base_name = describe(adapter, pieces, models), made_for(pieces)
    apart = [] if base is None or models is None else unfit(pieces, models)
    if as_json:
        table = {**dataclasses.asdict(found), "base": base_name, "unfit": apart}
        print(json.dumps(_finite(table), indent=1, allow_nan=False))
    else:
        _tell(found, base_name, apart, Console(highlight=False))


def _finite(value: Any) -> Any:
    """NaN and infinity, which JSON has no words for, as null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _models(pieces: "list[Piece]", base: str | None) -> "dict[str, nn.Module] | None":
    """The base's components where they can be had; only a base that was asked for has to be there."""
    try:
        found = find_base(pieces, base)
    except LorakitError:
        if base is not None:
            raise
        return None
    return None if found is None else found.models


def _recipe(pieces: "list[Piece]", adapter: Path) -> str:
    """YAML of the recipe in the metadata. Raises ModelError when there is none, or none of this version."""
    from pydantic import ValidationError

    from lorakit.recipe.load import dump
    from lorakit.recipe.schema import LlamaRecipe, SDRecipe

    text = next((piece.metadata["lorakit_recipe"] for piece in pieces if "lorakit_recipe" in piece.metadata), None)
    if text is None:
        raise ModelError("holds no recipe", where=str(adapter), hint="only adapters trained with lorakit do")
    kind = LlamaRecipe if any(key.component == "model" for key in pieces[0].keys.values()) else SDRecipe
    try:
        return dump(kind.model_validate_json(text))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ModelError(
            f"its recipe is not one of this version: {field}: {first['msg']}", where=str(adapter)
        ) from error


def _tell(found: "Description", base: str, unfit: list[str], console: Console) -> None:
    family = {"sd": "Stable Diffusion", "llama": "LLaMA"}[found.family]
    console.print(
        f"{found.kind} for {family}, {found.format} format, {found.bytes / 1e6:.2f} MB of {', '.join(found.dtypes)}"
    )
    console.print(
        f"{found.modules} modules, {found.parameters:,} parameters, norm of the whole change {found.norm:.4g}"
    )
    console.print(f"made for {escape(visible(base))}" if base else "its metadata names no base")
    number = partial(Column, justify="right")
    table = Table(Column("block", overflow="fold"), number("modules"), "rank", "alpha", number("norm"))
    for block in found.blocks:
        ranks, alphas = (", ".join(f"{value:g}" for value in values) for values in (block.ranks, block.alphas))
        table.add_row(escape(visible(block.name)), str(block.modules), ranks, alphas, f"{block.norm:.4g}")
    console.print(table)
    listed = (
        ("dead (A, B or scale is zero)", found.dead),
        ("beside LoRA of layers", found.beside),
        ("broken", found.faults),
        ("does not fit the base", unfit),
    )
    for title, names in listed:
        for name in names[:SHOWN]:
            console.print(f"[yellow]{title}: {escape(visible(name))}[/]", soft_wrap=True)
        if len(names) > SHOWN:
            console.print(f"[yellow]{title}: {len(names) - SHOWN} more[/]")
    for key, text in sorted(found.metadata.items()):
        shown = text if len(text) <= LONG else f"{text[:LONG]}… ({len(text)} characters)"
        console.print(f"{escape(visible(key))} = {escape(visible(shown))}", soft_wrap=True)

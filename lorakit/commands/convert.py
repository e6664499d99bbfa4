"""`lorakit convert`: an adapter from one format to another, compared with what was read."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lorakit.commands.adapters import base_for, named_base
from lorakit.commands.progress import warnings_to

if TYPE_CHECKING:
    from lorakit.adapters.formats import Format


def run(adapter: Path, out: Path, to: "Format", base: str | None, dtype: str | None) -> None:
    """Convert, and print how far the result is from what was read."""
    import torch

    from lorakit.adapters.convert import check_out, convert
    from lorakit.adapters.files import assemble
    from lorakit.adapters.pieces import open_pieces

    check_out(out, to)
    console = Console(stderr=True)
    with warnings_to(console):
        pieces = open_pieces(adapter)
        found = base_for(pieces, base, pieces[0].format, to)
        models = None if found is None else found.models
        done = convert(
            assemble(adapter, pieces, models),
            out,
            to,
            models=models,
            base_name=(found.name if found else "") or named_base(pieces),
            dtype=None if dtype is None else getattr(torch, dtype),
        )
    print(f"{pieces[0].format} -> {done.format}: {done.modules} modules ({done.dtypes}) in {done.out}")
    print(f"read back: largest |dW_in - dW_out| {done.largest:.2e}, in {done.where}")

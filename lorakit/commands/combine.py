"""`lorakit merge --as-adapter RANK`: several adapters as one, by singular values."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.commands.adapters import with_weights

if TYPE_CHECKING:
    from lorakit.adapters.merging.base import OpenBase


def run(
    name: str,
    base: "OpenBase",
    adapters: Sequence[tuple[Path, float]],
    out: Path,
    rank: int,
    *,
    dry_run: bool,
) -> None:
    """Write the best adapter of at most ``rank`` for the weighted sum as PEFT has it, and print what that keeps."""
    from lorakit.adapters.combine import combine
    from lorakit.adapters.convert import convert
    from lorakit.adapters.files import assemble
    from lorakit.adapters.pieces import open_pieces
    from lorakit.adapters.reduce import resize

    opened = [(path, open_pieces(path), weight) for path, weight in adapters]
    models = with_weights(base, [piece for _, pieces, _ in opened for piece in pieces])
    saved = [(assemble(path, pieces, models), weight) for path, pieces, weight in opened]
    smaller, kept = resize(combine(saved), rank)
    if dry_run:
        print(f"rank {rank} would keep {kept.share:.2%} of the sum (squared norm) in {kept.modules} modules: {out}")
        return
    done = convert(smaller, out, "peft", models=models, base_name=name)
    print(f"rank {rank} keeps {kept.share:.2%} of the sum (squared norm), of {kept.least_module} {kept.least:.2%}")
    print(f"peft: {done.modules} modules ({done.dtypes}) in {done.out}")

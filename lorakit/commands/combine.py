"""`lorakit merge --as-adapter RANK`: several adapters as one, by singular values."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def run(
    name: str,
    models: "Mapping[str, nn.Module]",
    adapters: Sequence[tuple[Path, float]],
    out: Path,
    rank: int,
    *,
    dry_run: bool,
) -> None:
    """Write the best adapter of at most ``rank`` for the weighted sum as PEFT has it, and print what that keeps."""
    from lorakit.adapters.combine import combine
    from lorakit.adapters.convert import convert
    from lorakit.adapters.files import read_adapter
    from lorakit.adapters.reduce import resize

    saved = [(read_adapter(path, models), weight) for path, weight in adapters]
    smaller, kept = resize(combine(saved), rank)
    if dry_run:
        print(f"rank {rank} would keep {kept.share:.2%} of the sum (squared norm) in {kept.modules} modules: {out}")
        return
    done = convert(smaller, out, "peft", models=models, base_name=name)
    print(f"rank {rank} keeps {kept.share:.2%} of the sum (squared norm), of {kept.least_module} {kept.least:.2%}")
    print(f"peft: {done.modules} modules ({done.dtypes}) in {done.out}")

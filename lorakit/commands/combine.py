"""`lorakit merge --as-adapter RANK`: several adapters as one, by singular values."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import ConflictError, RecipeError

if TYPE_CHECKING:
    from torch import nn

    from lorakit.commands.merge import Options


def run(
    name: str, models: "Mapping[str, nn.Module]", adapters: Sequence[tuple[Path, float]], out: Path, options: "Options"
) -> None:
    """Write the best adapter of at most ``as_adapter`` for the weighted sum as PEFT has it, and print what that keeps.

    Raises RecipeError for options that are a merged model's alone.
    """
    given = {"--dtype": options.dtype, "--quant-base": options.quant_base, "--overwrite": options.overwrite}
    for option, value in given.items():
        if value:
            raise RecipeError(f"--as-adapter and {option} do not go together", hint=f"leave {option} out")
    if os.path.lexists(out):
        raise ConflictError("exists already", where=str(out), hint="choose another name, or remove it")
    from lorakit.adapters.combine import combine
    from lorakit.adapters.convert import convert
    from lorakit.adapters.files import read_adapter
    from lorakit.adapters.reduce import resize

    saved = [(read_adapter(path, models), weight) for path, weight in adapters]
    rank = options.as_adapter or 0
    smaller, kept = resize(combine(saved), rank)
    if options.dry_run:
        print(f"rank {rank} would keep {kept.share:.2%} of the sum (squared norm) in {kept.modules} modules: {out}")
        return
    done = convert(smaller, out, "peft", models=models, base_name=name)
    print(f"rank {rank} keeps {kept.share:.2%} of the sum (squared norm), of {kept.least_module} {kept.least:.2%}")
    print(f"peft: {done.modules} modules ({done.dtypes}) in {done.out}")

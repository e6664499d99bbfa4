"""`lorakit merge`: adapters added to their base for good."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from lorakit.commands import combine
from lorakit.commands.adapters import open_headers, parse_adapter
from lorakit.commands.merge_told import compare_with, tell, tell_plan
from lorakit.commands.progress import warnings_to
from lorakit.errors import RecipeError

if TYPE_CHECKING:
    from lorakit.adapters.merging.base import OpenBase
    from lorakit.adapters.merging.plan import MergePlan, QuantBase
    from lorakit.storage.bases import BaseLocation

QUANT_BASE = {
    "original": "the change is added to the base's own weights, finer than the 4-bit ones that it was trained over",
    "as-trained": "every linear layer but the head is taken as the 4-bit weights of training show it (NF4, quantized "
    "and back), then the change is added: nearest to what was trained",
}
STORED_IN_4_BITS = "the base's own 4-bit weights are dequantized as bitsandbytes does, then the change is added"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to merge, beside what and where to."""

    scale: float = 1.0
    dtype: str | None = None
    quant_base: "QuantBase | None" = None
    revision: str | None = None
    overwrite: bool = False
    verify: bool = True
    dry_run: bool = False
    as_adapter: int | None = None
    """The rank, to write the adapters' sum as an adapter instead of a model."""


def run(base: str, adapters: Sequence[str], out: Path, options: Options) -> None:
    """Plan; then merge, with a bar, and print what was done."""
    from lorakit.adapters.convert import FILES, check_out
    from lorakit.paths import check_apart
    from lorakit.storage.bases import resolve
    from lorakit.storage.disk import open_more_files

    if not math.isfinite(options.scale):
        raise RecipeError(f"{options.scale} is not a finite number", where="--scale")
    if options.as_adapter is not None:
        _check_combining(options)
        check_out(out, "peft")
    elif out.suffix.lower() in FILES and out.suffix != ".safetensors":
        reason = "a model is written as a folder, or as a file whose name ends in .safetensors"
        raise RecipeError(reason, where=str(out))
    open_more_files()
    console, location = Console(stderr=True), resolve(base, options.revision, four_bit=True)
    parsed = [(path, weight * options.scale) for path, weight in map(parse_adapter, adapters)]
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with warnings_to(console):
        opened = _open(location, out)
        if options.as_adapter is not None:
            check_apart(out, [("base", location.path), *(("adapter", path) for path, _ in parsed)])
            combine.run(location.name, opened, parsed, out, options.as_adapter, dry_run=options.dry_run)
            return
        plan = _plan(location, opened, parsed, out, options)
        if options.quant_base is not None or opened.four_bit:
            quant_base = plan.settings.quant_base
            print(f"--quant-base {quant_base}: {STORED_IN_4_BITS if opened.four_bit else QUANT_BASE[quant_base]}")
        if options.dry_run:
            tell_plan(plan, options.overwrite)
            return
        from lorakit.adapters.merging.merge import merge

        with bar:
            task = bar.add_task("merging and verifying" if options.verify else "merging", total=None)
            report = merge(
                plan,
                overwrite=options.overwrite,
                verify=options.verify,
                compare=compare_with(plan) if options.verify else None,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    tell(report)


def _open(location: "BaseLocation", out: Path) -> "OpenBase":
    opened = open_headers(location)
    if location.layout == "diffusers" and out.suffix == ".safetensors":
        from lorakit.families.sd.pack import packed_names

        return replace(opened, packed=packed_names(location))
    return opened


def _plan(
    location: "BaseLocation", opened: "OpenBase", adapters: Sequence[tuple[Path, float]], out: Path, options: Options
) -> "MergePlan":
    import torch

    from lorakit.adapters.merging.plan import Settings, plan_merge

    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    quant_base = options.quant_base or ("as-trained" if opened.four_bit else "original")
    plan = plan_merge(location, opened, adapters, out, Settings(dtype, quant_base))
    if plan.template is not None:
        from lorakit.data.templates import ChatTemplate
        from lorakit.families.llama.base import as_folder
        from lorakit.families.llama.library import load_tokenizer

        tokenizer = load_tokenizer(as_folder(location, torch.float32))
        told = ", ".join(str(adapter.path) for adapter in plan.adapters)
        ChatTemplate(tokenizer, plan.template, f"the chat template of {told}").after_answer()
    return plan


def _check_combining(options: Options) -> None:
    """RecipeError for options that are a merged model's alone."""
    given = {"--dtype": options.dtype, "--quant-base": options.quant_base, "--overwrite": options.overwrite}
    given["--no-verify"] = not options.verify
    for option, value in given.items():
        if value:
            raise RecipeError(f"--as-adapter and {option} do not go together", hint=f"leave {option} out")

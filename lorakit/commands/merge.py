"""`lorakit merge`: adapters added to their base for good."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from lorakit.commands.generate import parse_adapter
from lorakit.commands.progress import warnings_to
from lorakit.errors import ModelError

if TYPE_CHECKING:
    from lorakit.adapters.merge import Compare, MergeReport
    from lorakit.adapters.merge_plan import MergePlan, QuantBase
    from lorakit.storage.bases import BaseLocation

TOLERANCE = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.25}
"""How far the merged model's outputs may be from base + adapter's, as a share of their spread: several times what
rounding the weights to the dtype does."""
ROOM = 0.7
"""Share of the free memory that a model may take to be compared."""
QUANT_BASE = {
    "original": "the change is added to the base's own weights, finer than the 4-bit ones that it was trained over",
    "as-trained": "every linear layer but the head is taken as the 4-bit weights of training show it (NF4, quantized "
    "and back), then the change is added: nearest to what was trained",
}


@dataclass(frozen=True)
class Options:
    """How to merge, beside what and where to."""

    scale: float = 1.0
    dtype: str | None = None
    quant_base: "QuantBase | None" = None
    revision: str | None = None
    overwrite: bool = False
    verify: bool = True
    dry_run: bool = False


def run(base: str, adapters: Sequence[str], out: Path, options: Options) -> None:
    """Plan; then merge, with a bar, and print what was done."""
    parsed = [(path, weight * options.scale) for path, weight in map(parse_adapter, adapters)]
    from lorakit.storage.bases import resolve

    console, location = Console(stderr=True), resolve(base, options.revision)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with warnings_to(console):
        plan = _plan(location, parsed, out, options)
        if options.quant_base is not None:
            print(f"--quant-base {options.quant_base}: {QUANT_BASE[options.quant_base]}")
        if options.dry_run:
            _tell_plan(plan, options.overwrite)
            return
        from lorakit.adapters.merge import merge

        with bar:
            task = bar.add_task("merging", total=None)
            report = merge(
                plan,
                overwrite=options.overwrite,
                verify=options.verify,
                compare=_compare(plan) if options.verify else None,
                progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
            )
    _tell(report)


def _plan(location: "BaseLocation", adapters: Sequence[tuple[Path, float]], out: Path, options: Options) -> "MergePlan":
    import torch

    from lorakit.adapters.merge_base import open_base
    from lorakit.adapters.merge_plan import Settings, plan_merge

    original, folder = None, location
    if location.layout == "single-file":
        from lorakit.families.sd.original import open_original

        original = open_original(location)
    elif location.layout == "gguf":
        from lorakit.families.llama.base import as_folder

        folder = as_folder(location, torch.float32)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    settings = Settings(dtype, options.quant_base or "original")
    return plan_merge(location, open_base(folder, original), adapters, out, settings)


def _compare(plan: "MergePlan") -> "Compare | None":
    """What compares the outputs; None, and a line that says why, where a model does not fit into memory."""
    import psutil

    needed = 4 * plan.elements
    free = psutil.virtual_memory().available
    if needed > ROOM * free:
        print(f"too large to compare outputs: {needed / 1e9:.1f} GB in float32, {free / 1e9:.1f} GB free; tensors only")
        return None
    adapters = [(adapter.path, adapter.weight) for adapter in plan.adapters]

    def compare(place: Path) -> dict[str, Any]:
        if plan.base.family == "sd":
            from lorakit.families.sd.compare import compare as compare_sd

            share, told = compare_sd(plan.base, adapters, place)
        else:
            from lorakit.families.llama.compare import compare as compare_llama

            quantized = plan.settings.quant_base == "as-trained"
            share, told = compare_llama(plan.base, adapters, place, "nf4" if quantized else "none")
        allowed = max(TOLERANCE[dtype] for dtype in plan.dtypes)
        if not share <= allowed:
            hint = "the merged model was removed; --dtype float32 rounds less"
            raise ModelError(f"does not verify: {told}, allowed are {allowed:.0%}", where=str(plan.out), hint=hint)
        return {"difference": share, "allowed": allowed, "in_words": told}

    return compare


def _tell_plan(plan: "MergePlan", overwrite: bool) -> None:
    from lorakit.adapters.out import check_out, check_space
    from lorakit.adapters.receipt import other_base

    check_out(plan, overwrite)
    free = check_space(plan)
    print(f"base     {plan.base.name} ({plan.base.layout})")
    for adapter in plan.adapters:
        ranks = ", ".join(map(str, adapter.ranks))
        print(f"adapter  {adapter.path} x {adapter.weight:g} ({adapter.format}, rank {ranks})")
        if warning := other_base(adapter, plan.base):
            print(f"         {warning}")
    tensors = sum(len(file.tensors) for file in plan.files.values())
    print(f"changes  {plan.changed} of {tensors} tensors, summed in float32, rounded once")
    if plan.untied:
        print("         the head, tied to the embedding, gets a weight of its own, and the config says so")
    for name, file in plan.files.items():
        print(f"writes   {plan.out / name}: {len(file.tensors)} tensors, {file.size / 1e9:.3f} GB")
    print(f"in all   {plan.size / 1e9:.3f} GB ({', '.join(plan.dtypes)}), {free / 1e9:.1f} GB are free")


def _tell(report: "MergeReport") -> None:
    print(f"merged {report.changed} tensors ({report.dtype}) into {report.out}, {report.size / 1e6:.1f} MB")
    print(f"largest rounding error {report.rounding:.2e}; {report.lost:.2%} of the change lost to rounding")
    if report.checked is not None:
        print(f"verified: {report.checked.changed} tensors recomputed in float64, every other one as in the base")
    if report.compared is not None:
        print(f"verified: {report.compared['in_words']}")
    print(f'next: lorakit generate --base {report.out} --prompt "..."')

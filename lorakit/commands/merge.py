"""`lorakit merge`: an adapter added to its base for good."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from lorakit.commands.progress import warnings_to

if TYPE_CHECKING:
    from lorakit.adapters.merge import MergeReport


@dataclass(frozen=True)
class Options:
    """How to merge, beside what and where to."""

    scale: float = 1.0
    dtype: str | None = None
    revision: str | None = None
    overwrite: bool = False


def run(base: str, adapter: Path, out: Path, options: Options) -> None:
    """Merge, with a bar, and print what was done."""
    import torch

    from lorakit.adapters.merge import merge
    from lorakit.adapters.merge_plan import plan_merge
    from lorakit.storage.bases import resolve

    console, location = Console(stderr=True), resolve(base, options.revision)
    original = None
    if location.layout == "single-file":
        from lorakit.families.sd.original import open_original

        original = open_original(location)
    bar = Progress(
        TextColumn("merging"),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar, warnings_to(console):
        task = bar.add_task("merging", total=None)
        plan = plan_merge(
            location,
            [(adapter, options.scale)],
            out,
            dtype=None if options.dtype is None else getattr(torch, options.dtype),
            overwrite=options.overwrite,
            original=original,
        )
        report = merge(
            plan,
            overwrite=options.overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    _tell(report)


def _tell(report: "MergeReport") -> None:
    print(f"merged {report.modules} weights ({report.dtype}) into {report.out}, {report.bytes / 1e6:.1f} MB")
    print(f"largest rounding error {report.rounding:.2e}; {report.lost:.2%} of the change lost to rounding")
    print(f'next: lorakit generate --base {report.out} --prompt "..."')

"""`lorakit resize`: an adapter of a lower rank."""

from pathlib import Path

from rich.console import Console

from lorakit.commands.adapters import named_base, read_for
from lorakit.commands.progress import counted, warnings_to


def run(adapter: Path, out: Path, rank: int, base: str | None) -> None:
    """Write ``adapter`` with at most ``rank`` a module in its own format, and print what that keeps."""
    from lorakit.adapters.convert import check_out, convert
    from lorakit.adapters.pieces import open_pieces
    from lorakit.adapters.reduce import resize
    from lorakit.paths import check_apart

    check_apart(out, [("adapter", adapter), *([] if base is None else [("base", Path(base).expanduser())])])
    with warnings_to(Console(stderr=True)):
        pieces = open_pieces(adapter)
        form = pieces[0].format
        check_out(out, form)
        whole, found = read_for(adapter, pieces, base, form)
        models = None if found is None else found.models
        with counted("modules") as progress:
            smaller, kept = resize(whole, rank, progress)
        name = (found.name if found else "") or named_base(pieces)
        done = convert(smaller, out, form, models=models, base_name=name)
    print(f"rank {rank} keeps {kept.share:.2%} of the change (squared norm), of {kept.least_module} {kept.least:.2%}")
    print(f"{form}: {done.modules} modules ({done.dtypes}) in {done.out}")

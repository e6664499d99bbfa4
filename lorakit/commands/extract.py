"""`lorakit extract`: an adapter from a base and a fully tuned model."""

from pathlib import Path

from rich.console import Console

from lorakit.commands.adapters import open_headers
from lorakit.commands.progress import counted, warnings_to
from lorakit.errors import RecipeError


def run(base: str, tuned: str, out: Path, rank: int) -> None:
    """Write the best adapter of ``rank`` for the difference as PEFT has it, and print what that keeps."""
    from lorakit.adapters.convert import check_out, convert
    from lorakit.adapters.reduce import FullModel, extract
    from lorakit.paths import check_apart
    from lorakit.storage.bases import resolve
    from lorakit.storage.disk import open_more_files

    check_out(out, "peft")
    open_more_files()
    one, other = resolve(base), resolve(tuned)
    if one.family != other.family:
        kinds = {"sd": "a Stable Diffusion", "llama": "a language model"}
        raise RecipeError(f"{one.name} is {kinds[one.family]}, {other.name} is {kinds[other.family]}")
    check_apart(out, [("base", one.path), ("tuned model", other.path)])
    with warnings_to(Console(stderr=True)):
        opened = open_headers(one)
        with counted("weights") as progress:
            saved, kept = extract(
                FullModel(one.name, opened), FullModel(other.name, open_headers(other)), rank, progress
            )
        convert(saved, out, "peft", models=opened.models, base_name=one.name)
    print(f"rank {rank} keeps {kept.share:.2%} of the difference of {kept.modules} layers (squared norm), "
          f"of {kept.least_module} {kept.least:.2%}")  # fmt: skip
    if kept.left_out:
        print(f"left out: {len(kept.left_out)} tensors that LoRA does not reach, {kept.left_share:.2%} of the whole "
              f"difference: {', '.join(kept.left_out[:3])}{' …' if len(kept.left_out) > 3 else ''}")  # fmt: skip
    print(f"peft: {out}")

"""`lorakit generate`: pictures or answers, whichever family the base is of."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakit.commands.adapters import parse_adapter
from lorakit.commands.progress import warnings_to
from lorakit.errors import DataError, RecipeError, shown
from lorakit.training.stop import stopping_at_once


@dataclass(frozen=True, kw_only=True)
class Request:
    """What both families need to know."""

    base: str
    revision: str | None
    adapters: tuple[str, ...]
    prompts: tuple[str, ...]
    prompts_file: Path | None
    out: Path | None
    device: str
    precision: str
    seed: int
    fuse: bool = False
    resume: bool = False
    """Go on with what a batch that was stopped left undone."""
    given: frozenset[str] = frozenset()
    """Names of the settings that were given, rather than left at their defaults."""


def run(request: Request, *, sd: Mapping[str, Any], llama: Mapping[str, Any]) -> None:
    """Generate for every prompt; ``sd`` and ``llama`` are the family's own settings, of which one is used."""
    prompts = _prompts(request)
    _check_texts({"prompt": prompts, "system": [llama["system"]], "negative-prompt": [sd["negative_prompt"]]})
    adapters = [parse_adapter(text) for text in request.adapters]

    from lorakit.storage.bases import resolve

    location, console = resolve(request.base, request.revision), Console(stderr=True)
    others = set(llama if location.family == "sd" else sd)
    for name in sorted(others & request.given):
        raise RecipeError(f"is not for {location.name}", where=f"--{name.replace('_', '-')}", hint="leave it out")
    with warnings_to(console), stopping_at_once("stopped", "") as beginning:
        from lorakit.commands.batch import Batch

        kept = Path("answers.jsonl") if location.family == "llama" and request.prompts_file else None
        batch = Batch(
            location=location,
            adapters=adapters,
            prompts=prompts,
            out=request.out or kept,
            device=request.device,
            precision=request.precision,
            seed=request.seed,
            fuse=request.fuse,
            resume=request.resume,
            beginning=beginning,
        )
        if location.family == "sd":
            from lorakit.commands.draw import draw

            draw(batch, sd)
        else:
            from lorakit.commands.answer import answer

            answer(batch, llama)


def _prompts(request: Request) -> list[str]:
    prompts = [*request.prompts, *(_read_prompts(request.prompts_file) if request.prompts_file is not None else ())]
    if not prompts:
        raise RecipeError("there is no prompt", hint="give --prompt TEXT or --prompts FILE")
    return prompts


def _read_prompts(path: Path) -> Iterator[str]:
    """A prompt a line; of a .jsonl file the field ``prompt``, which may have several lines."""
    if path.suffix == ".jsonl":
        from lorakit.data.records import read_records

        for row, where in read_records(str(path)):
            if not isinstance(row.get("prompt"), str):
                raise DataError("there is no text in the field 'prompt'", where=where)
            yield row["prompt"]
        return
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path)) from error
    yield from (line.removesuffix("\r") for line in lines if line.strip())


def _check_texts(given: Mapping[str, Iterable[str | None]]) -> None:
    """RecipeError for an option that is not UTF-8: Python makes half a character of such a byte."""
    for option, texts in given.items():
        for text in texts:
            if text is not None and any("\ud800" <= c <= "\udfff" for c in text):
                raise RecipeError(f"not UTF-8: {shown(text[:80])}", where=f"--{option}")

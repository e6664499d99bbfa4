"""`lorakit generate`: pictures or answers, whichever family the base is of."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lorakit.commands.progress import warnings_to
from lorakit.errors import ConflictError, DataError, RecipeError

if TYPE_CHECKING:
    from lorakit.data.chat import Message
    from lorakit.families.place import Place
    from lorakit.storage.bases import BaseLocation


@dataclass(frozen=True)
class Request:
    """What both families need to know."""

    base: str
    revision: str | None
    adapters: tuple[str, ...]
    prompts: tuple[str, ...]
    prompts_file: Path | None
    out: Path | None
    device: str
    seed: int
    fuse: bool = False


def run(request: Request, *, sd: Mapping[str, Any], llama: Mapping[str, Any]) -> None:
    """Generate for every prompt; ``sd`` and ``llama`` are the family's own settings, of which one is used."""
    prompts = _prompts(request)
    adapters = [parse_adapter(text) for text in request.adapters]

    from lorakit.storage.bases import resolve

    location, console = resolve(request.base, request.revision), Console(stderr=True)
    with warnings_to(console):
        if location.family == "sd":
            _draw(request, location, prompts, adapters, sd)
        else:
            _answer(request, location, prompts, adapters, llama)


def parse_adapter(text: str) -> tuple[Path, float]:
    """``PATH`` or ``PATH:WEIGHT``; RecipeError when there is nothing at the path."""
    path, weight = Path(text), 1.0
    head, colon, tail = text.rpartition(":")
    if colon and not path.exists():
        try:
            path, weight = Path(head), float(tail)
        except ValueError:
            raise RecipeError(f"{tail!r} is not a weight", where=f"--adapter {text}", hint="PATH:0.8, say") from None
    if not path.exists():
        raise RecipeError(
            "there is no such adapter", where=str(path), hint="give a run folder, a PEFT folder or a file"
        )
    return path, weight


def _prompts(request: Request) -> list[str]:
    prompts = list(request.prompts)
    if request.prompts_file is not None:
        try:
            lines = request.prompts_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot be read: {error}", where=str(request.prompts_file)) from error
        prompts += [line for line in lines if line.strip()]
    if not prompts:
        raise RecipeError("there is no prompt", hint="give --prompt TEXT or --prompts FILE")
    return prompts


def _place(device: str) -> "Place":
    from lorakit.families.place import Place
    from lorakit.recipe.schema import Compute
    from lorakit.training.device import choose

    return Place(*choose(Compute.model_validate({"device": device})))


def _draw(
    request: Request,
    location: "BaseLocation",
    prompts: list[str],
    adapters: list[tuple[Path, float]],
    options: Mapping[str, Any],
) -> None:
    """Numbered PNG files after those that are there already, and a grid when there are several pictures."""
    from lorakit.families.sd.generate import DrawSettings, grid, open_painter, save_picture

    out = request.out or Path("pictures")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConflictError("is not a folder", where=str(out), hint="give a folder for the pictures with --out")
    place = _place(request.device)
    painter = open_painter(location, adapters, place.device, place.dtype, fuse=request.fuse)
    settings = DrawSettings(seed=request.seed, **options)
    settings.check(painter.parts)
    out.mkdir(parents=True, exist_ok=True)
    first = 1 + max((int(p.stem) for p in out.glob("*.png") if p.stem.isdigit()), default=0)
    drawn = painter.draw(prompts, settings)
    for number, (picture, metadata) in enumerate(drawn, start=first):
        save_picture(picture, metadata, out / f"{number:04d}.png")
        print(out / f"{number:04d}.png")
    if len(drawn) > 1:
        labels = [str(metadata["prompt"]) for _, metadata in drawn]
        sheet = out / f"grid-{first:04d}.png"
        save_picture(grid([picture for picture, _ in drawn], labels), {}, sheet)
        print(sheet)


def _answer(
    request: Request,
    location: "BaseLocation",
    prompts: list[str],
    adapters: list[tuple[Path, float]],
    options: Mapping[str, Any],
) -> None:
    """Stream to the terminal; with ``--out`` or ``--prompts`` also write {"prompt", "answer"} lines as they finish."""
    from lorakit.families.llama.generate import Settings, open_chat

    out = request.out or (Path("answers.jsonl") if request.prompts_file else None)
    if out is not None and (out.exists() or out.is_symlink()):
        raise ConflictError("exists already", where=str(out), hint="give another file with --out")
    chat = open_chat(location, adapters, _place(request.device), fuse=request.fuse)
    names = ("temperature", "top_p", "min_p", "max_new_tokens")
    settings = Settings(seed=request.seed, **{name: options[name] for name in names})
    for prompt in prompts:
        if len(prompts) > 1:
            print(f"> {prompt}")
        question = prompt if options["raw"] else _messages(prompt, options["system"])
        pieces = []
        for piece in chat.stream(question, settings):
            pieces.append(piece)
            print(piece, end="", flush=True)
        print()
        if out is not None:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"prompt": prompt, "answer": "".join(pieces)}, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _messages(prompt: str, system: str | None) -> list["Message"]:
    from lorakit.data.chat import Message

    before = [Message("system", system)] if system is not None else []
    return [*before, Message("user", prompt)]

"""`lorakit generate`: pictures or answers, whichever family the base is of."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lorakit.commands.adapters import parse_adapter
from lorakit.commands.progress import warnings_to
from lorakit.errors import (
    INTERRUPTED,
    TERMINATED,
    ConflictError,
    DataError,
    RecipeError,
    ResourceError,
    Stopped,
    shown,
)
from lorakit.storage.atomic import disk_errors, write_bytes
from lorakit.training.stop import Beginning, StopSignals, stopping_at_once

if TYPE_CHECKING:
    from PIL.Image import Image

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
    others = {*llama, "fuse"} if location.family == "sd" else set(sd)
    for name in sorted(others & request.given):
        raise RecipeError(f"is not for {location.name}", where=f"--{name.replace('_', '-')}", hint="leave it out")
    with warnings_to(console), stopping_at_once("stopped", "") as beginning:
        if location.family == "sd":
            _draw(request, location, prompts, adapters, sd, beginning)
        else:
            _answer(request, location, prompts, adapters, llama, beginning)


def _prompts(request: Request) -> list[str]:
    prompts = list(request.prompts)
    if request.prompts_file is not None:
        try:
            lines = request.prompts_file.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot be read: {error}", where=str(request.prompts_file)) from error
        prompts += [line.removesuffix("\r") for line in lines if line.strip()]
    if not prompts:
        raise RecipeError("there is no prompt", hint="give --prompt TEXT or --prompts FILE")
    return prompts


def _check_texts(given: Mapping[str, Iterable[str | None]]) -> None:
    """RecipeError for an option that is not UTF-8: Python makes half a character of such a byte."""
    for option, texts in given.items():
        for text in texts:
            if text is not None and any("\ud800" <= c <= "\udfff" for c in text):
                raise RecipeError(f"not UTF-8: {shown(text[:80])}", where=f"--{option}")


def _make_folder(folder: Path, out: Path) -> None:
    """Make the folder that ``out`` is or goes into; ResourceError when there can be no such place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            out.lstat()  # a name may be too long
    except OSError as error:
        reason = f"cannot be written: {error.strerror}"
        raise ResourceError(reason, where=str(out), hint="give another place with --out") from error


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
    beginning: Beginning,
) -> None:
    """Numbered PNG files after those that are there already, and a grid when there are several pictures."""

    from lorakit.families.sd.drawing import DrawSettings
    from lorakit.families.sd.generate import open_painter
    from lorakit.families.sd.pictures import grid, read_settings, save_picture

    out = request.out or Path("pictures")
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir()):
        raise ConflictError("is not a folder", where=str(out), hint="give a folder for the pictures with --out")
    place = _place(request.device)
    painter = open_painter(location, adapters, place.device, place.dtype)
    settings = DrawSettings(seed=request.seed, **options)
    settings.check(painter.parts.size, painter.parts.factor)
    jobs = painter.jobs(prompts, settings)
    if request.resume:
        done = [metadata for path in sorted(out.glob("*.png")) if (metadata := read_settings(path)) is not None]
        jobs = [job for job in jobs if painter.metadata(*job, settings) not in done]
    _make_folder(out, out)
    first = 1 + max((int(p.stem) for p in out.glob("*.png") if p.stem.isdigit()), default=0)
    drawn: list[Image] = []
    labels: list[str] = []
    with _stoppable(beginning) as signals:
        for number, (picture, metadata) in enumerate(painter.paint(jobs, settings), start=first):
            save_picture(picture, metadata, out / f"{number:04d}.png")
            print(out / f"{number:04d}.png", flush=True)
            drawn.append(picture)
            labels.append(str(metadata["prompt"]))
            _check_stop(signals, out)
    if len(drawn) > 1:
        sheet = out / f"grid-{first:04d}.png"
        save_picture(grid(drawn, labels), {}, sheet)
        print(sheet)


def _answer(
    request: Request,
    location: "BaseLocation",
    prompts: list[str],
    adapters: list[tuple[Path, float]],
    options: Mapping[str, Any],
    beginning: Beginning,
) -> None:
    """Stream to the terminal; with ``--out`` or ``--prompts`` also write {"prompt", "answer"} lines as they finish."""
    from lorakit.families.llama.generate import Settings, open_chat

    out = request.out or (Path("answers.jsonl") if request.prompts_file else None)
    for name in ("system", "chat_template"):
        if options["raw"] and options[name] is not None:
            option = f"--{name.replace('_', '-')}"
            hint = "a raw prompt goes through no chat template"
            raise RecipeError(f"--raw and {option} do not go together", hint=hint)
    if request.resume and out is None:
        raise RecipeError("has no answers to go on after", where="--resume", hint="give their file with --out")
    prompts = _unanswered(out, prompts) if out is not None and request.resume else prompts
    if out is not None and not request.resume and os.path.lexists(out):
        raise ConflictError("exists already", where=str(out), hint="give another file with --out, or --resume")
    if out is not None:
        _make_folder(out.parent, out)
    for name in ("temperature", "top_p", "min_p"):
        if not math.isfinite(options[name]):
            raise RecipeError(f"{options[name]} is not a finite number", where=name)
    template = options["chat_template"]
    chat = open_chat(location, adapters, _place(request.device), chat_template=template, fuse=request.fuse)
    names = ("temperature", "top_p", "min_p", "max_new_tokens")
    settings = Settings(seed=request.seed, **{name: options[name] for name in names})
    questions = [prompt if options["raw"] else _messages(prompt, options["system"]) for prompt in prompts]
    pieces: list[str] = []
    with _stoppable(beginning) as signals:
        for number, piece in chat.answers(questions, settings):
            if not pieces and len(prompts) > 1:
                print(f"> {prompts[number]}")
            pieces.append(piece)
            if piece:
                print(piece, end="", flush=True)
            else:
                print(flush=True)
                if out is not None:
                    line = {"prompt": prompts[number], "answer": "".join(pieces)}
                    with disk_errors(out), out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
                pieces.clear()
            _check_stop(signals, out)


def _unanswered(out: Path, prompts: list[str]) -> list[str]:
    """The prompts after those that ``out`` has answers to; a line that was cut off is removed.

    Raises ConflictError when ``out`` holds anything but answers to the first of the prompts.
    """
    if not os.path.lexists(out):
        return prompts
    conflict = ConflictError("holds other than the answers to these prompts", where=str(out), hint="give another --out")
    if out.is_symlink() or not out.is_file():
        raise conflict
    whole = out.read_bytes().rpartition(b"\n")[0].splitlines(keepends=True)
    try:
        answered = [json.loads(line)["prompt"] for line in whole]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise conflict from error
    if answered != prompts[: len(answered)]:
        raise conflict
    text = b"".join(whole)
    write_bytes(out, text + b"\n" if text else text)
    return prompts[len(answered) :]


def _stoppable(beginning: Beginning) -> StopSignals:
    """The end of ``beginning``: from now on a signal is noted, for ``_check_stop``."""
    beginning.check()
    told = "stopping after this; a second signal stops at once"
    return StopSignals(lambda _: Console(stderr=True).print(told), world=1)


def _check_stop(signals: StopSignals, kept: Path | None) -> None:
    """Raises Stopped after a signal. Between two pictures or pieces of text, since libraries swallow what is raised
    inside them."""
    if signals.received:
        name, code = ("SIGTERM", TERMINATED) if signals.sigterm else ("SIGINT", INTERRUPTED)
        hint = f"the same command with --resume goes on after what is in {kept}" if kept else ""
        raise Stopped(f"{name}: stopped", exit_code=code, hint=hint)


def _messages(prompt: str, system: str | None) -> list["Message"]:
    from lorakit.data.chat import Message

    before = [Message("system", system)] if system is not None else []
    return [*before, Message("user", prompt)]

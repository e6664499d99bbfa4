"""`lorakit generate` with a language model: answers."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.adapters.pieces import identity
from lorakit.commands.batch import Batch, check_stop, make_folder
from lorakit.data.chat import Message
from lorakit.errors import ConflictError, RecipeError
from lorakit.storage.atomic import write_bytes, write_text
from lorakit.storage.bases import base_id
from lorakit.storage.disk import disk_errors


def answer(batch: Batch, options: Mapping[str, Any]) -> None:
    """Stream to the terminal; where there is a file to write, add a {"prompt", "answer"} line for each that is done.

    Beside the file stands what the answers were made with, for --resume.
    """
    out = batch.out
    for name in ("system", "chat_template"):
        if options["raw"] and options[name] is not None:
            option = f"--{name.replace('_', '-')}"
            hint = "a raw prompt goes through no chat template"
            raise RecipeError(f"--raw and {option} do not go together", hint=hint)
    if batch.resume and out is None:
        raise RecipeError("has no answers to go on after", where="--resume", hint="give their file with --out")
    if out is not None and not batch.resume and os.path.lexists(out):
        raise ConflictError("exists already", where=str(out), hint="give another file with --out, or --resume")
    place = batch.place()
    adapters = [identity(path, weight) for path, weight in batch.adapters]
    made_with = {"adapters": adapters, "precision": str(place.dtype), "seed": batch.seed, "fuse": batch.fuse, **options}
    if out is not None:
        made_with["base"] = base_id(batch.location)  # which takes a while for a large one
    if out is not None and batch.resume and os.path.lexists(out):
        _check_settings(out, made_with)
    prompts = _unanswered(out, batch.prompts) if out is not None and batch.resume else batch.prompts
    if not prompts:
        print(f"{out} has all answers")
        return
    if out is not None:
        make_folder(out.parent, out)
    for name in ("temperature", "top_p", "min_p"):
        if not math.isfinite(options[name]):
            where = f"--{name.replace('_', '-')}"
            raise RecipeError(f"{options[name]} is not a finite number", where=where)
    from lorakit.families.llama.generate import Settings, open_chat  # takes seconds, so after what is soon refused

    template = options["chat_template"]
    chat = open_chat(batch.location, batch.adapters, place, chat_template=template, fuse=batch.fuse)
    names = ("temperature", "top_p", "min_p", "max_new_tokens")
    settings = Settings(seed=batch.seed, **{name: options[name] for name in names})
    questions = [prompt if options["raw"] else _messages(prompt, options["system"]) for prompt in prompts]
    pieces: list[str] = []
    with batch.stoppable() as signals:
        for number, piece in chat.answers(questions, settings):
            if not pieces and len(prompts) > 1:
                print(f"> {prompts[number]}")
            pieces.append(piece)
            if piece:
                print(piece, end="", flush=True)
            else:
                print(flush=True)
                if out is not None:
                    if not os.path.lexists(out):
                        write_text(_settings(out), json.dumps(made_with, ensure_ascii=False, indent=1) + "\n")
                    line = {"prompt": prompts[number], "answer": "".join(pieces)}
                    with disk_errors(out), out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
                pieces.clear()
            check_stop(signals, out)


def _settings(out: Path) -> Path:
    """What all answers of ``out`` were made with, as JSON."""
    return out.with_name(f"{out.name}.settings.json")


def _check_settings(out: Path, made_with: Mapping[str, Any]) -> None:
    """Raises ConflictError when the answers that are there were made with anything else."""
    try:
        earlier = json.loads(_settings(out).read_bytes())
        changed = [name for name in made_with if earlier[name] != made_with[name]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"how its answers were made is not to be read from {_settings(out).name}"
        raise ConflictError(reason, where=str(out), hint="give another --out") from error
    if changed:
        reason = f"its answers were made with another {' and '.join(changed)}"
        raise ConflictError(reason, where=str(out), hint="give what they were made with, or another --out")


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


def _messages(prompt: str, system: str | None) -> list[Message]:
    before = [Message("system", system)] if system is not None else []
    return [*before, Message("user", prompt)]

"""`lorakit generate` with a language model: answers."""

import math
import os
from collections.abc import Mapping
from typing import Any

from lorakit.adapters.pieces import identity
from lorakit.commands.answers_file import Answers
from lorakit.commands.batch import Batch, check_stop, make_folder
from lorakit.data.chat import Message
from lorakit.errors import ConflictError, RecipeError
from lorakit.families.place import Place
from lorakit.storage.bases import base_id


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
    if batch.fuse and options["quantization"] != "none":
        raise RecipeError("--fuse and --quantization do not go together", hint="quantized weights take no sum")
    if batch.resume and out is None:
        raise RecipeError("has no answers to go on after", where="--resume", hint="give their file with --out")
    if out is not None and not batch.resume and os.path.lexists(out):
        raise ConflictError("exists already", where=str(out), hint="give another file with --out, or --resume")
    place = batch.place()
    adapters = [identity(path, weight) for path, weight in batch.adapters]
    made_with = {"adapters": adapters, "precision": str(place.dtype), "seed": batch.seed, "fuse": batch.fuse, **options}
    if out is None:
        _answer(batch, place, options, batch.prompts, None)
        return
    made_with["base"] = base_id(batch.location)  # which takes a while for a large one
    with Answers(out, made_with) as answers:
        prompts = answers.unanswered(batch.prompts) if batch.resume else batch.prompts
        if not prompts:
            print(f"{out} has all answers")
            return
        make_folder(out.parent, out)
        _answer(batch, place, options, prompts, answers)


def _answer(
    batch: Batch, place: Place, options: Mapping[str, Any], prompts: list[str], answers: Answers | None
) -> None:
    for name in ("temperature", "top_p", "min_p"):
        if not math.isfinite(options[name]):
            where = f"--{name.replace('_', '-')}"
            raise RecipeError(f"{options[name]} is not a finite number", where=where)
    from lorakit.families.llama.generate import Settings, open_chat  # takes seconds, so after what is soon refused

    chat = open_chat(
        batch.location,
        batch.adapters,
        place,
        quantization=options["quantization"],
        chat_template=options["chat_template"],
        fuse=batch.fuse,
    )
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
                if answers is not None:
                    answers.add(prompts[number], "".join(pieces))
                print(flush=True)
                pieces.clear()
            check_stop(signals, batch.out)


def _messages(prompt: str, system: str | None) -> list[Message]:
    before = [Message("system", system)] if system is not None else []
    return [*before, Message("user", prompt)]

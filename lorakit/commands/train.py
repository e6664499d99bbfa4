"""`lorakit train-sd` and `lorakit train-llama`: each section of the recipe to the part that owns it."""

import logging
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lorakit.commands.progress import Terminal, warnings_to
from lorakit.errors import RecipeError, shown
from lorakit.recipe import load
from lorakit.recipe.schema import LlamaRecipe, SDRecipe

if TYPE_CHECKING:
    from lorakit.families.place import Place
    from lorakit.families.task import Task
    from lorakit.numerics.order import Layout
    from lorakit.storage.runs import RunFolder
    from lorakit.training.launch import Session
    from lorakit.training.loop import Outcome

log = logging.getLogger("lorakit")


@dataclass(frozen=True, kw_only=True)
class Mode:
    """How the command was called, beside the recipe."""

    dry_run: bool = False
    resume: bool = False
    allow: bool = False
    processes: int = 1


def run(kind: type[SDRecipe] | type[LlamaRecipe], path: Path, overrides: list[str], mode: Mode) -> None:
    """Train what the recipe says; with ``mode.dry_run`` only print the plan."""
    if mode.allow and not mode.resume:
        raise RecipeError("is for a run that is resumed", where="--allow", hint="add --resume, or leave it out")
    if mode.dry_run and mode.resume:
        raise RecipeError("--dry-run and --resume do not go together", hint="the plan is of a run from its start")
    recipe = load.load(path, SDRecipe, overrides) if kind is SDRecipe else load.load(path, LlamaRecipe, overrides)
    words = ["train-sd" if kind is SDRecipe else "train-llama", str(path)]
    words += [w for override in overrides for w in ("--set", override)]
    if mode.dry_run:
        from lorakit.commands import plan

        with warnings_to(Console(stderr=True)):
            plan.run(recipe, mode.processes)
    elif mode.processes > 1:
        from lorakit.training.launch import relaunch

        flags = [flag for flag, given in (("--resume", mode.resume), ("--allow", mode.allow)) if given]
        raise SystemExit(relaunch([*words, *flags], mode.processes, device=recipe.compute.device))
    else:
        _train(recipe, mode, words)


def _train(recipe: SDRecipe | LlamaRecipe, mode: Mode, words: list[str]) -> None:
    from lorakit.families.place import Place
    from lorakit.numerics.order import Layout
    from lorakit.training import launch, loop, optim
    from lorakit.training.stop import stopping_at_once

    session = launch.open_session(recipe.compute)
    root = recipe.output.folder / recipe.output.name
    resume_command = _resume_command([*words, *(["--allow"] if mode.allow else [])], session.world)
    failed = True
    try:
        with session.told_once():
            optim.check_division(recipe.train, recipe.compute, session.world)
            session.gather(None)  # ranks that cannot reach one another say so before they load anything
        with (
            session.told_once(),
            stopping_at_once("stopped before the first step", f"go on with: {resume_command}") as beginning,
            Terminal(quiet=not session.is_main) as terminal,
            warnings_to(terminal.console),
            _open(root, session, resume=mode.resume) as run_folder,
        ):
            terminal.stage(f"loading {recipe.base.model}")
            layout = Layout(
                recipe.train.seed,
                recipe.train.batch_size,
                recipe.compute.gradient_accumulation,
                session.rank,
                session.world,
            )
            place = Place(session.device, session.dtype, recipe.compute.gradient_checkpointing)
            task = load_task(recipe, layout, place)
            if advice := optim.advice(recipe.train, task.steps_per_epoch):
                log.warning("%s", advice)
            plan = loop.Plan(
                train=recipe.train,
                optimizer=recipe.optimizer,
                compute=recipe.compute,
                sample_every=recipe.sample.every,
                track=recipe.output.track,
                recipe=load.as_dict(recipe),
                recipe_text=load.dump(recipe),
                resume=mode.resume,
                allow=mode.allow,
                resume_command=resume_command,
            )
            beginning.check()
            outcome = loop.train(task, session, plan, run_folder, terminal)
            beginning.over = True
            finished_before = mode.resume and not terminal.trained
        if session.is_main:
            if finished_before:
                print("the run had finished already")
            _tell(recipe, root, outcome, task.generate_options)
        failed = False
    finally:
        session.close(failed=failed)


def _open(root: Path, session: "Session", *, resume: bool) -> "RunFolder":
    """The run's folder, which rank 0 looks at and locks before any loads a model."""
    from lorakit.storage.runs import RunFolder

    opened: list[RunFolder] = []
    open_it = RunFolder.open_existing if resume else RunFolder.open_new
    session.on_main(lambda: opened.append(open_it(root)))
    return opened[0] if opened else RunFolder(root)


def load_task(recipe: SDRecipe | LlamaRecipe, layout: "Layout", place: "Place") -> "Task":
    """The finished task of the recipe's family."""
    if isinstance(recipe, SDRecipe):
        from lorakit.families.sd import task as sd

        learning = sd.Learning.of(recipe.train, recipe.optimizer)
        return sd.load(recipe.base, recipe.adapter, recipe.data, learning, recipe.sample, layout, place)
    from lorakit.families.llama import task as llama

    rate = recipe.optimizer.learning_rate
    return llama.load(recipe.base, recipe.adapter, recipe.data, recipe.sample, layout, place, learning_rate=rate)


def _resume_command(words: list[str], world: int) -> str:
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:  # several nodes, each with its own accelerate launch
        return shlex.join(["accelerate", "launch", "...", "-m", "lorakit", *words, "--resume"])
    ranks = ["--num-processes", str(world)] if world > 1 else []
    return shlex.join(["lorakit", *words, *ranks, "--resume"])


def _tell(recipe: SDRecipe | LlamaRecipe, root: Path, outcome: "Outcome", options: Sequence[str]) -> None:
    minutes = outcome.seconds / 60
    print(f"trained {outcome.steps} steps on {outcome.examples} examples in {minutes:.1f} minutes: {shown(root)}")
    if outcome.first_held_out is not None:
        print(f"held-out loss {outcome.first_held_out:.4f} -> {outcome.last_held_out:.4f}")
    revision = ["--revision", recipe.base.revision] if recipe.base.revision else []
    words = ["--base", recipe.base.model, *revision, "--adapter", str(root), *options]
    command = shlex.join(["lorakit", "generate", *words])
    print(f'next: {shown(command)} --prompt "..."')

"""`--dry-run`: what a recipe would train, on what, for how long and in how much memory. No weights are read."""

from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

from lorakit.paths import free_bytes
from lorakit.recipe.schema import LlamaRecipe, Optimizer, SDRecipe

if TYPE_CHECKING:
    from lorakit.families.llama.plan import LlamaPlan
    from lorakit.families.place import Place
    from lorakit.families.sd.plan import SDPlan

STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2.03, "paged_adamw_8bit": 2.03, "lion_8bit": 1.02}
"""Optimizer state a trainable parameter: two float32 moments, or one byte a moment and a float32 scale a 256 block."""


def run(recipe: SDRecipe | LlamaRecipe, processes: int) -> None:
    """Print the plan. Raises what training would raise of the recipe, its base and its data before the first step."""
    from lorakit.families.place import Place
    from lorakit.training import optim
    from lorakit.training.device import choose

    optim.check_division(recipe.train, recipe.compute, processes)
    place = Place(*choose(recipe.compute), recipe.compute.gradient_checkpointing)
    _show(recipe, _plan(recipe, place, processes), place, processes)


def _show(recipe: SDRecipe | LlamaRecipe, plan: "LlamaPlan | SDPlan", place: "Place", processes: int) -> None:
    from lorakit.training import optim

    total = optim.total_steps(recipe.train, plan.steps_per_epoch)
    console = Console(highlight=False)
    console.print(_modules(plan))
    trained = plan.trainable_parameters
    console.print(f"trainable {trained:,} of {plan.total_parameters + trained:,} parameters "
                  f"({trained / (plan.total_parameters + trained):.3%})")  # fmt: skip
    console.print(plan.examples)
    console.print(
        f"{total} steps of {recipe.train.batch_size} examples, {total / plan.steps_per_epoch:.2f} epochs; "
        f"{processes} rank(s) x {recipe.compute.gradient_accumulation} micro-batch(es) of "
        f"{recipe.train.batch_size // (processes * recipe.compute.gradient_accumulation)}"
    )
    points = sorted({0, round(total * 0.05), total // 4, total // 2, 3 * total // 4, total - 1})
    rates = "  ".join(f"{step}: {optim.learning_rate_at(recipe.optimizer, step, total):.2e}" for step in points)
    console.print(f"learning rate after so many steps ({recipe.optimizer.schedule}):  {rates}")
    console.print(_memory(plan, recipe.optimizer, str(place.device), str(place.dtype).removeprefix("torch.")))
    console.print(_disk(recipe, trained))
    for note in (*plan.notes, *filter(None, [optim.advice(recipe.train, plan.steps_per_epoch)])):
        console.print(note, style="yellow", markup=False)


def _plan(recipe: SDRecipe | LlamaRecipe, place: "Place", processes: int) -> "LlamaPlan | SDPlan":
    from lorakit.numerics.order import Layout

    layout = Layout(recipe.train.seed, recipe.train.batch_size, recipe.compute.gradient_accumulation, 0, processes)
    if isinstance(recipe, SDRecipe):
        from lorakit.families.sd import plan as sd

        return sd.plan(recipe.base, recipe.adapter, recipe.data, recipe.sample, layout, place)
    from lorakit.families.llama import plan as llama

    return llama.plan(recipe.base, recipe.adapter, recipe.data, recipe.sample, layout, place)


def _modules(plan: "LlamaPlan | SDPlan") -> Table:
    """The layers that get LoRA, those of one kind and shape on one line."""
    kinds = Counter(
        (".".join("*" if part.isdigit() else part for part in t.name.split(".")), t.outputs, t.inputs, t.rank)
        for t in plan.modules
    )
    table = Table(
        Column("layers with LoRA", overflow="fold"),
        "how many",
        r"W \[out, in]",
        "rank",
        title=f"{len(plan.modules)} layers",
    )
    for (name, outputs, inputs, rank), count in kinds.items():
        table.add_row(name, str(count), f"[{outputs}, {inputs}]".replace("[", r"\["), str(rank))
    return table


def _memory(plan: "LlamaPlan | SDPlan", optimizer: Optimizer, device: str, dtype: str) -> Table:
    parts = {**plan.memory, "optimizer state": int(plan.trainable_parameters * STATE_BYTES[optimizer.name])}
    table = Table("estimated memory", "MB", title=f"on {device}, {dtype}")
    for name, size in parts.items():
        table.add_row(name, f"{size / 1e6:,.1f}")
    table.add_row("together", f"{sum(parts.values()) / 1e6:,.1f}")
    return table


def _disk(recipe: SDRecipe | LlamaRecipe, trained: int) -> str:
    """Adapter and checkpoints, beside what the disk has."""
    a_checkpoint = trained * (4 + STATE_BYTES[recipe.optimizer.name])
    need = (recipe.train.keep_checkpoints + 1) * a_checkpoint + 8 * trained
    free = free_bytes(recipe.output.folder)
    told = "what is free is not known" if free is None else f"{free / 1e9:,.1f} GB free"
    return f"disk: {need / 1e6:,.1f} MB for checkpoints and the adapter, {told}"

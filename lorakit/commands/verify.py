"""`lorakit verify`: the recipe's own first batch by the fast path and by plain means, loss and gradients compared.

Plain means are PEFT's layers, eager attention a document at a time, and cross-entropy over all logits (or diffusers'
attention). In a wider dtype they say what is exact; in the recipe's own they say how much of a difference is rounding.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lorakit.commands.progress import warnings_to
from lorakit.errors import ModelError, RecipeError
from lorakit.recipe.load import load_any
from lorakit.recipe.schema import LlamaRecipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lorakit.families.task import Task

FACTORS = {"loss": 2.0, "gradient": 2.0, "worst tensor": 4.0}
"""The fast path may be this many times as far from exact as plain means in the same dtype, and a rounding more: in one
tensor chance weighs more than in all together."""
SMALLEST = 4 * 2.0**-23
"""The least of a rounding that is allowed: losses are sums in float32."""


def run(path: Path, overrides: list[str]) -> None:
    """Print both differences. RecipeError for a quantized base, whose plain means are no others; ModelError when the
    fast path is further from exact than rounding explains."""
    import torch

    from lorakit.commands.train import load_task
    from lorakit.families.place import Place
    from lorakit.numerics.order import Layout
    from lorakit.training.device import choose

    recipe = load_any(path, overrides)
    if isinstance(recipe, LlamaRecipe) and recipe.base.quantization != "none":
        hint = "verify the recipe with --set base.quantization=none"
        raise RecipeError("a quantized base cannot be widened to compare with", where="base.quantization", hint=hint)
    device, dtype = choose(recipe.compute)
    layout = Layout(recipe.train.seed, recipe.train.batch_size, recipe.compute.gradient_accumulation)
    with warnings_to(Console(stderr=True)):
        task = load_task(recipe, layout, Place(device, dtype, recipe.compute.gradient_checkpointing))
    batch = next(task.batches("train", 0)).to(device)
    _start_from_learned(task)
    task.model.eval()  # no dropout
    exact = torch.float64 if dtype == torch.float32 else torch.float32
    fast = _measured(task, lambda: task.loss(batch))
    plain = _measured(task, lambda: task.plain_loss(batch, dtype))
    wanted = _measured(task, lambda: task.plain_loss(batch, exact))
    rows = {name: _differences(one, wanted, dtype) for name, one in (("fast path", fast), ("plain means", plain))}
    names = [str(one).removeprefix("torch.") for one in (dtype, exact)]
    table = Table("", *FACTORS, title=f"{names[0]} beside plain means in {names[1]}")
    for what, found in rows.items():
        table.add_row(what, *(f"{found[column]:.1e}" for column in FACTORS))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"relative differences on the first batch ({batch.count} items), of {len(wanted) - 1} gradients")
    slack = max(torch.finfo(dtype).eps, SMALLEST)
    if any(rows["fast path"][name] > times * rows["plain means"][name] + slack for name, times in FACTORS.items()):
        raise ModelError("the fast path is further from exact than rounding explains", where=str(path))


def _start_from_learned(task: "Task") -> None:
    """B starts at zero, where A has no gradient to compare: move every trained tensor a little, by a fixed seed."""
    import torch

    generator = torch.Generator().manual_seed(0)
    state = task.adapter_state()
    for tensor in state.values():
        tensor += 0.01 * torch.randn(tensor.shape, generator=generator)
    task.load_adapter_state(state)


def _measured(task: "Task", loss: "Callable[[], Tensor]") -> "dict[str, Tensor]":
    """The loss and the gradient of every trained tensor, in float64."""
    import torch

    for parameters, _ in task.parameter_groups():
        for parameter in parameters:
            parameter.grad = None
    value = loss()
    torch.autograd.backward(value)
    found = {"loss": value.detach().double().cpu()}
    for number, parameter in enumerate(p for parameters, _ in task.parameter_groups() for p in parameters):
        if parameter.grad is not None:
            found[str(number)] = parameter.grad.double().cpu()
    return found


def _differences(
    found: "Mapping[str, Tensor]", wanted: "Mapping[str, Tensor]", dtype: "torch.dtype"
) -> dict[str, float]:
    """|found - wanted| / |wanted| of the loss, of all gradients as one vector, and the largest of a tensor's gradient;
    one that is smaller than a rounding of all together is held against that."""
    import torch

    if found.keys() != wanted.keys():
        raise ModelError("the fast path gives gradients to other tensors than plain means do")
    errors = {key: float((found[key] - wanted[key]).norm()) for key in wanted}
    norms = {key: max(float(wanted[key].norm()), 1e-30) for key in wanted}
    loss = errors.pop("loss") / norms.pop("loss")
    whole = math.hypot(*norms.values())
    least = torch.finfo(dtype).eps * whole
    worst = max(error / max(norms[key], least) for key, error in errors.items())
    return {"loss": loss, "gradient": math.hypot(*errors.values()) / whole, "worst tensor": worst}

"""Optimizers, the learning rate as a function of the step, and optimizer state as plain tensors.

The 8-bit optimizers keep their moments in blocks of 256 numbers with one scale a block (Dettmers et al. 2022,
arXiv:2110.02861). bitsandbytes leaves tensors under 4,096 elements in 32 bit, which takes in many a LoRA matrix (rank
4 on width 320 has 1,280), so that "8-bit" would hold for part of the adapter only. We set the limit to one full block,
which all of ``FlatParameters`` has: the whole adapter has 8-bit state.
"""

import json
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lorakit.errors import CheckpointError, RecipeError
from lorakit.recipe.schema import Compute, Optimizer, Train

MIN_8BIT_SIZE = 256
_SCALARS = "scalars"
_SHARED = "shared"

log = logging.getLogger("lorakit")


FEW = 100
"""Steps; B starts at zero, and a LoRA of fewer has hardly moved."""


def total_steps(train: Train, steps_per_epoch: float) -> int:
    """Updates in the whole run: ``train.steps``, or as many as the epochs (1 when neither is given) take."""
    epochs = 1.0 if train.epochs is None else train.epochs
    return train.steps if train.steps is not None else max(1, math.ceil(epochs * steps_per_epoch - 1e-9))


def advice(train: Train, steps_per_epoch: float) -> str:
    """What to say of a run that is as short as it is because nobody said how long it should be; else nothing."""
    total = total_steps(train, steps_per_epoch)
    if total >= FEW or train.steps is not None or train.epochs is not None:
        return ""
    return f"one pass over the data is {total} steps, which may be too few: train.steps or train.epochs makes more"


def check_division(train: Train, compute: Compute, world: int) -> None:
    """Raises RecipeError where the batch is not as large a micro-batch on each of ``world`` ranks each time."""
    parts = world * compute.gradient_accumulation
    if train.batch_size % parts:
        reason = f"{train.batch_size} examples do not divide into {parts} micro-batches"
        hint = "make it a multiple of ranks x compute.gradient_accumulation"
        raise RecipeError(reason, where="train.batch_size", hint=hint)


def learning_rate_at(optimizer: Optimizer, step: int, total: int) -> float:
    """The rate of the update that follows ``step`` finished ones, of ``total`` in the run."""
    return optimizer.learning_rate * _factor(optimizer, step, total)


def _factor(optimizer: Optimizer, step: int, total: int) -> float:
    """Share of the peak rate. Warmup never starts at exactly 0, and decay reaches 0 after the last update, not before
    it, so that no update is wasted."""
    warmup = round(optimizer.warmup * total) if optimizer.warmup < 1 else int(optimizer.warmup)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if optimizer.schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1 - done if optimizer.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


def build(
    groups: Sequence[tuple[list[nn.Parameter], float]], optimizer: Optimizer, total_steps: int, start: int = 0
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The optimizer over (parameters, peak rate) groups, and its schedule after ``start`` finished updates."""
    listed = [{"params": parameters, "lr": peak, "initial_lr": peak} for parameters, peak in groups]
    built = _build(listed, optimizer)
    return built, LambdaLR(built, lambda step: _factor(optimizer, step, total_steps), last_epoch=start - 1)


def _build(groups: list[dict[str, Any]], optimizer: Optimizer) -> torch.optim.Optimizer:
    common: dict[str, Any] = {"betas": optimizer.betas, "weight_decay": optimizer.weight_decay}
    if optimizer.name == "adamw":
        return torch.optim.AdamW(groups, **common, fused=True)
    import bitsandbytes.optim

    quantized: Any = bitsandbytes.optim
    if optimizer.name == "lion_8bit":
        lion: torch.optim.Optimizer = quantized.Lion8bit(groups, **common, min_8bit_size=MIN_8BIT_SIZE)
        return lion
    paged = optimizer.name == "paged_adamw_8bit"
    if paged and groups[0]["params"][0].device.type == "cpu":
        log.warning("paged optimizer state needs CUDA; on the CPU paged_adamw_8bit is adamw_8bit")
        paged = False
    # PagedAdamW8bit is AdamW8bit with this flag.
    built: torch.optim.Optimizer = quantized.AdamW8bit(groups, **common, min_8bit_size=MIN_8BIT_SIZE, is_paged=paged)
    return built


def step(optimizer: torch.optim.Optimizer, scheduler: LambdaLR, scaler: torch.amp.GradScaler | None) -> None:
    """One update and one step of the schedule.

    With a scaler (fp16) the update is left out where the gradient overflowed. The schedule goes on, since the rate is a
    function of the step; PyTorch warns of that when it happens at the first update.
    """
    if scaler is None:
        optimizer.step()
        scheduler.step()
        return
    scaler.step(optimizer)
    scaler.update()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        scheduler.step()


def state_to_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], str]:
    """All optimizer state as (tensors on the CPU by ``INDEX.NAME``, JSON), exactly; learning rates are not part of it.

    INDEX counts parameters in group order. The quantization maps that bitsandbytes shares between parameters are stored
    once: the JSON says which name stands for which.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, float] = {}
    shared: dict[str, str] = {}
    first: dict[int, str] = {}
    for index, (_, _, parameter) in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            key = f"{index}.{name}"
            if not isinstance(value, Tensor):
                scalars[key] = value
            elif id(value) in first:
                shared[key] = first[id(value)]
            else:
                first[id(value)] = key
                tensors[key] = value.detach().cpu().clone().contiguous()
    return tensors, json.dumps({_SCALARS: scalars, _SHARED: shared})


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], meta: str) -> None:
    """Put back what ``state_to_tensors`` gave, bit for bit; CheckpointError when it does not fit the parameters."""
    stored = json.loads(meta)
    values: dict[str, Any] = {**tensors, **stored[_SCALARS]}
    values.update({key: values[source] for key, source in stored[_SHARED].items()})
    by_index: dict[int, dict[str, Any]] = {}
    for key, value in values.items():
        place, name = key.split(".", 1)
        by_index.setdefault(int(place), {})[name] = value
    parameters = _parameters(optimizer)
    if by_index and max(by_index) >= len(parameters):
        raise CheckpointError(f"optimizer state for parameter {max(by_index)} of {len(parameters)}")
    for index, state in by_index.items():
        group, position, parameter = parameters[index]
        fresh = _fresh_state(optimizer, group, position, parameter)
        if fresh.keys() != state.keys():
            raise CheckpointError(f"optimizer state {sorted(state)} where {sorted(fresh)} belongs", where=f"{index}")
        for name, value in state.items():
            fresh[name] = _put(fresh[name], value, f"{index}.{name}")
        optimizer.state[parameter] = fresh


def _fresh_state(optimizer: torch.optim.Optimizer, group: int, place: int, parameter: nn.Parameter) -> dict[str, Any]:
    """A parameter's state as its first update would make it: buffers in their dtype, on their device, paged or not."""
    if not isinstance(optimizer, torch.optim.AdamW):
        optimizer.init_state(optimizer.param_groups[group], parameter, group, place)  # type: ignore[attr-defined]
        made: dict[str, Any] = optimizer.state[parameter]
        return made
    moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), device=parameter.device), **moments}


def _put(target: Any, value: Any, key: str) -> Any:
    if not isinstance(target, Tensor):
        return value
    if not isinstance(value, Tensor) or target.shape != value.shape or target.dtype != value.dtype:
        raise CheckpointError("optimizer state of another shape or dtype than this run's", where=key)
    with torch.no_grad():
        target.copy_(value)  # in place: quantization maps stay shared
    return target


def _parameters(optimizer: torch.optim.Optimizer) -> list[tuple[int, int, nn.Parameter]]:
    return [(g, p, w) for g, group in enumerate(optimizer.param_groups) for p, w in enumerate(group["params"])]

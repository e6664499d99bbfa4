"""What the peers share: the plan, the first adapter, and a metrics file of a line a step. Imports no lorakit, so that a
peer may run in an environment of its own."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.benchmarks.plan import Plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def arguments() -> argparse.Namespace:
    """work: the folder of the comparison; out: where metrics.jsonl goes; variant: what the peer offers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--variant", default="")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    return given


class StepLog:
    """metrics.jsonl: {"step", "loss", "seconds", "work", "labelled"} a line, ``seconds`` from one step's end to the
    next one's, so that loading data counts."""

    def __init__(self, out: Path) -> None:
        self._path = out / "metrics.jsonl"
        self._path.write_text("")
        self._step = 0
        self.start()

    def start(self) -> None:
        """Begin to time the next step."""
        self._began = time.perf_counter()

    def end(self, loss: float, work: int, labelled: int) -> None:
        """A step is over."""
        now = time.perf_counter()
        self._step += 1
        row = {"step": self._step, "loss": loss, "seconds": now - self._began, "work": work, "labelled": labelled}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._began = now


def start_adapter(model: Any, plan: Plan, work: Path) -> list[torch.nn.Parameter]:
    """Set PEFT's A and B to the plan's first ones, float32; gives the trainable parameters, all of which were set.

    Raises ValueError when the model trains anything else, so that no contender trains more or less than another.
    """
    first = load_file(work / "initial.safetensors")
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in found.items():
        plain = name.replace(".default.", ".").removeprefix("base_model.model.")
        if plain not in first or first[plain].shape != parameter.shape:
            raise ValueError(f"{name} is not in the adapter of the comparison")
        parameter.data = first.pop(plain).float()
    total = sum(parameter.numel() for parameter in found.values())
    if first or total != plan.trainable:
        raise ValueError(f"trains {total} numbers of {plan.trainable}; left over: {', '.join(list(first)[:3])}")
    return list(found.values())


def optimizer(parameters: list[torch.nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
    """torch's AdamW at a constant rate, as in the recipe."""
    return torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=plan.weight_decay)


def autocast(plan: Plan) -> torch.autocast:
    """Mixed precision as trainers use it: off for fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=plan.precision == "bf16")

"""A real small task under the contract: LoRA on two frozen linear layers that label sequences of uneven length."""

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, linear

from lorakit.numerics.order import Layout, micro_batches
from lorakit.recipe.schema import Compute, Optimizer, Train
from lorakit.storage.fingerprint import Fingerprint
from lorakit.training.launch import Session
from lorakit.training.loop import Plan

EXAMPLES, HELD_OUT, WIDTH, HIDDEN, LABELS, RANK = 40, 6, 48, 64, 7, 8


@dataclass(frozen=True)
class TinyBatch:
    x: Tensor
    labels: Tensor
    count: int
    ids: tuple[str, ...]

    def to(self, device: torch.device) -> Self:
        return replace(self, x=self.x.to(device), labels=self.labels.to(device))


class LoRA(nn.Module):
    def __init__(self, wide: int, out: int, share: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, wide) / wide**0.5, requires_grad=False)
        self.a = nn.Parameter(torch.randn(RANK, wide) / wide**0.5)
        self.b = nn.Parameter(torch.randn(out, RANK) / 10)
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight) + linear(linear(dropout(x, self.share, self.training), self.a), self.b)


class TinyTask:
    """``nan_at``: name of an example whose input is NaN. ``delay``: seconds that a loss takes in training. ``fate``: a
    signal that rank 1 gets as it makes its ninth micro-batch. ``seeds``: torch's, at each loss in training.
    """

    base_id = "tiny sha256:0"
    fingerprint = Fingerprint([(f"line:{i}", f"{i:032x}") for i in range(EXAMPLES)], [])

    def __init__(
        self, layout: Layout, *, share: float, nan_at: str = "", delay: float = 0, samples: bool = False, fate: str = ""
    ) -> None:
        self.layout, self.nan_at, self.delay, self.samples, self.fate = layout, nan_at, delay, samples, fate
        self.base_texts: Mapping[str, str] = {}
        self.seeds: list[int] = []
        self.steps_per_epoch = EXAMPLES / layout.batch_size
        with torch.random.fork_rng([]):
            torch.manual_seed(layout.seed)
            self.model: nn.Module = nn.Sequential(LoRA(WIDTH, HIDDEN, share), nn.Tanh(), LoRA(HIDDEN, LABELS, share))
        self.lengths = [1 + 3 * i % 5 for i in range(EXAMPLES + HELD_OUT)]

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        first, _, second = self.model
        return [([first.a, first.b], 1e-2), ([second.a, second.b], 5e-3)]

    def example(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 + index)
        x = torch.randn(self.lengths[index], WIDTH, generator=generator)
        labels = (x[:, :LABELS] + x[:, LABELS : 2 * LABELS].roll(1, dims=1)).argmax(1)
        return (x * float("nan") if f"line:{index}" == self.nan_at else x), labels

    def batch(self, indices: list[int]) -> TinyBatch:
        xs, labels = zip(*map(self.example, indices), strict=True) if indices else ((torch.zeros(0, WIDTH),), ())
        stacked = torch.cat(labels) if labels else torch.zeros(0, dtype=torch.long)
        return TinyBatch(torch.cat(xs), stacked, len(stacked), tuple(f"line:{i}" for i in indices))

    def batches(self, split: str, start: int) -> Iterator[TinyBatch]:
        if split == "held_out":
            ranks = range(self.layout.rank, HELD_OUT + self.layout.world - 1, self.layout.world)
            for index in islice(ranks, -(-HELD_OUT // self.layout.world)):
                yield self.batch([EXAMPLES + index] if index < HELD_OUT else [])
            return
        for number, draws in enumerate(micro_batches(self.layout, self.lengths[:EXAMPLES], start)):
            if number == 8 and self.layout.rank == 1 and self.fate:
                print(f"fate {time.time()}", flush=True)
                os.kill(os.getpid(), getattr(signal, self.fate))
            yield self.batch([draw.index for draw in draws])

    def loss(self, batch: TinyBatch) -> Tensor:
        if self.model.training:
            time.sleep(self.delay)
            self.seeds.append(torch.initial_seed())
        return cross_entropy(self.model(batch.x).float(), batch.labels, reduction="sum")

    def metrics(self, held_out_loss: float) -> Mapping[str, float]:
        return {"twice": 2 * held_out_loss}

    def sample(self, out: Path) -> None:
        torch.manual_seed(7)
        if self.samples:
            (out / "answer.txt").write_text(str(self.model(self.example(0)[0]).sum().item()))

    def adapter_state(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.adapter_state().items():
                parameter.copy_(state[name])

    def save(self, out: Path, name: str, recipe: Mapping[str, Any] | None = None) -> None:
        tensors = {k: v.detach().clone() for k, v in self.adapter_state().items()}
        save_file(tensors, out / f"{name}.safetensors", {"recipe": json.dumps(recipe)})


def make_task(session: Session, options: Mapping[str, Any], **more: Any) -> TinyTask:
    plan = make_plan(options)
    layout = Layout(
        plan.train.seed, plan.train.batch_size, plan.compute.gradient_accumulation, session.rank, session.world
    )
    return TinyTask(layout, share=plan.recipe["adapter"]["dropout"], **more)


def make_plan(options: Mapping[str, Any], **more: Any) -> Plan:
    """``options``: fields of train, optimizer and compute mixed, and dropout."""

    def section(kind: Any) -> Any:
        return kind(**{key: value for key, value in options.items() if key in kind.model_fields})

    train, optimizer, compute = section(Train), section(Optimizer), section(Compute)
    recipe = {"adapter": {"dropout": options.get("dropout", 0.0)}}
    recipe |= {"train": train.model_dump(mode="json"), "optimizer": optimizer.model_dump(mode="json")}
    recipe |= {"compute": compute.model_dump(mode="json")}
    defaults = {"sample_every": 0, "track": [], "resume_command": "lorakit train --resume", "recipe_text": "tiny\n"}
    return Plan(train=train, optimizer=optimizer, compute=compute, recipe=recipe, **{**defaults, **more})


def final_state(task: TinyTask) -> dict[str, Tensor]:
    """Copies of the adapter and of the gradient of its last update."""
    state = {name: p.detach().clone() for name, p in task.adapter_state().items()}
    return state | {f"{name}.grad": p.grad.clone() for name, p in task.adapter_state().items() if p.grad is not None}

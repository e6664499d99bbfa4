"""The plain peer for LLaMA: transformers + PEFT, a padded batch, the model's own loss over full logits.

python -m tests.benchmarks.peer_peft WORK OUT
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.benchmarks import peer_common
from tests.benchmarks.plan import Plan, steps

MASKED = -100


def padded(rows: list[list[list[int]]]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, int64 [B, T], padded behind."""
    width = max(len(tokens) for tokens, _ in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), width, dtype=torch.int64),
        "attention_mask": torch.zeros(len(rows), width, dtype=torch.int64),
        "labels": torch.full((len(rows), width), MASKED),
    }
    for number, (tokens, labels) in enumerate(rows):
        batch["input_ids"][number, : len(tokens)] = torch.tensor(tokens)
        batch["attention_mask"][number, : len(tokens)] = 1
        batch["labels"][number, : len(tokens)] = torch.tensor(labels)
    return batch


def train(
    work: Path,
    out: Path,
    plan: Plan,
    parameters: list[torch.nn.Parameter],
    loss_of: Callable[[dict[str, torch.Tensor]], Any],
) -> None:
    """The comparison's steps in a plain loop; ``loss_of`` gives the mean over a padded batch's labels."""
    optimizer = peer_common.optimizer(parameters, plan)
    log = peer_common.StepLog(out)
    for rows in steps(work):
        batch = padded(rows)
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, plan.clip)
        optimizer.step()
        optimizer.zero_grad()
        labelled = int((batch["labels"][:, 1:] != MASKED).sum())
        log.end(float(loss.detach()), int(batch["attention_mask"].sum()), labelled)


def main() -> None:
    given = peer_common.arguments()
    plan = Plan.load(given.work)
    base = AutoModelForCausalLM.from_pretrained(
        given.work / "base", dtype=peer_common.DTYPES[plan.precision], attn_implementation="sdpa"
    )
    names = sorted({name.rpartition(".")[2] for name in plan.targets})
    config = LoraConfig(r=plan.rank, lora_alpha=plan.rank, target_modules=names, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    parameters = peer_common.start_adapter(model, plan, given.work)

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with peer_common.autocast(plan):
            found: torch.Tensor = model(**batch, use_cache=False).loss
        return found

    train(given.work, given.out, plan, parameters, loss)


if __name__ == "__main__":
    main()

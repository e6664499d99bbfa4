"""The peer for LLaMA that users would pick: TRL's SFTTrainer with PEFT, on the same tokens and labels.

    python -m tests.benchmarks.peer_trl WORK OUT --variant padded|padding-free|packed

padded and padding-free see the comparison's batches in its order. packed lets TRL put whole chats into rows of
max_tokens (best fit decreasing) and takes as many rows a step as hold about as many tokens. Activations are kept, as
the other contenders keep them (SFTConfig would recompute them, which is slower).
"""

from collections import deque
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from tests.benchmarks import peer_common
from tests.benchmarks.plan import Plan, steps

MASKED = -100


class Recorder(TrainerCallback):
    """Times the steps and takes the losses that the trainer logs; counts what the collator hands out.

    The loader collates a batch ahead of the step, so the counts wait in a queue.
    """

    def __init__(self, log: peer_common.StepLog, collate: Any) -> None:
        self.log, self._collate = log, collate
        self._counts: deque[tuple[int, int]] = deque()

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self._collate(examples)
        real = batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel()
        self._counts.append((int(real), int((batch["labels"][:, 1:] != MASKED).sum())))
        return batch

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.log.start()

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs is not None and "loss" in logs:
            self.log.end(float(logs["loss"]), *self._counts.popleft())


def settings(plan: Plan, variant: str, out: Path) -> SFTConfig:
    """The comparison's plan in the trainer's words."""
    packed = variant == "packed"
    rows = max(1, round(sum(plan.work) / len(plan.work) / plan.max_tokens)) if packed else plan.batch
    return SFTConfig(
        output_dir=str(out / "trl"),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        max_steps=plan.steps,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=plan.weight_decay,
        max_grad_norm=plan.clip,
        bf16=plan.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="sequential",
        max_length=None if variant == "padding-free" else plan.max_tokens,
        packing=packed,
        padding_free=variant == "padding-free",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def main() -> None:
    given = peer_common.arguments()
    plan = Plan.load(given.work)
    rows = [row for step in steps(given.work) for row in step]
    data = Dataset.from_list([{"input_ids": tokens, "labels": labels} for tokens, labels in rows])
    tokenizer = AutoTokenizer.from_pretrained(given.work / "base")
    base = AutoModelForCausalLM.from_pretrained(
        given.work / "base", dtype=peer_common.DTYPES[plan.precision], attn_implementation="sdpa"
    )
    names = sorted({name.rpartition(".")[2] for name in plan.targets})
    trainer = SFTTrainer(
        model=base,
        args=settings(plan, given.variant, given.out),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=plan.rank, lora_alpha=plan.rank, target_modules=names, task_type="CAUSAL_LM"),
    )
    peer_common.start_adapter(trainer.model, plan, given.work)
    recorder = Recorder(peer_common.StepLog(given.out), trainer.data_collator)
    trainer.data_collator = recorder.collate
    trainer.add_callback(recorder)
    trainer.train()


if __name__ == "__main__":
    main()

"""litgpt as a peer for LLaMA: its model and LoRA layers, its loss over chunks of logits, a padded batch.

    python -m tests.benchmarks.peer_litgpt WORK OUT

Weights and adapter are in the comparison's dtype, as its ``bf16-true`` has them, the fastest that it offers on a CPU.
"""

from pathlib import Path
from typing import Any

import torch
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.utils import chunked_cross_entropy
from safetensors.torch import load_file

from tests.benchmarks import peer_common
from tests.benchmarks.peer_peft import MASKED, train
from tests.benchmarks.plan import Plan

MODEL = "SmolLM2-135M-Instruct"


def converted(base: Path, out: Path) -> dict[str, Any]:
    """The base's weights by litgpt's names."""
    folder = out / MODEL
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    convert_hf_checkpoint(folder, model_name=MODEL)
    weights: dict[str, Any] = torch.load(folder / "lit_model.pth", mmap=True, weights_only=True)
    return weights


def start_adapter(model: Any, plan: Plan, work: Path) -> list[torch.nn.Parameter]:
    """Set A and B to the plan's first ones; litgpt stacks those of q, k and v. Raises ValueError when it trains
    another number of weights."""
    first = load_file(work / "initial.safetensors")
    for number, block in enumerate(model.transformer.h):
        for module, names in ((block.attn.qkv, "qkv"), (block.attn.proj, "o")):
            for letter, parameter in (("A", module.lora_A), ("B", module.lora_B)):
                whole = f"model.layers.{number}.self_attn.{{}}_proj.lora_{letter}.weight"
                parameter.data = torch.cat([first[whole.format(name)] for name in names]).to(parameter.dtype)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = sum(parameter.numel() for parameter in parameters)
    if total != plan.trainable:
        raise ValueError(f"trains {total} numbers of {plan.trainable}")
    return parameters


def main() -> None:
    given = peer_common.arguments()
    plan = Plan.load(given.work)
    lora = {f"lora_{name}": True for name in ("query", "key", "value", "projection")}
    config = Config.from_name(MODEL, lora_r=plan.rank, lora_alpha=plan.rank, lora_dropout=0.0, **lora)
    model = GPT(config).to(peer_common.DTYPES[plan.precision])
    model.load_state_dict(converted(given.work / "base", given.out), strict=False)
    model.max_seq_length = plan.max_tokens
    mark_only_lora_as_trainable(model)
    parameters = start_adapter(model, plan, given.work)

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(batch["input_ids"], lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        found: torch.Tensor = chunked_cross_entropy(logits, batch["labels"][:, 1:], ignore_index=MASKED)
        return found

    train(given.work, given.out, plan, parameters, loss)


if __name__ == "__main__":
    main()

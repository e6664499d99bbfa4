"""Make the work folder of the merge benchmark: a Llama of random weights and an adapter. A process of its own, so that
its memory does not count as that of what is measured.

    python -m tests.benchmarks.prepare_merge WORK [--hidden N --inner N --layers N ...]
"""

import argparse
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.tiny import tiny_tokenizer

SHARD = 5_000_000_000
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """Llama 3.1 8B's."""

    hidden: int = 4096
    inner: int = 14336
    layers: int = 32
    heads: int = 32
    key_value_heads: int = 8
    vocabulary: int = 128256
    tied: int = 0

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=4096,
            tie_word_embeddings=bool(self.tied),
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
        )


def write_base(folder: Path, config: LlamaConfig, tokenizer: Any) -> int:
    """A sharded model folder of random weights as the hub has it, with a tokenizer; bytes of the weights."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    draws = torch.randn(64 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    shards: list[dict[str, torch.Size]] = [{}]
    filled = total = 0
    for name, parameter in model.named_parameters():
        if filled + 2 * parameter.numel() > SHARD:
            shards.append({})
            filled = 0
        shards[-1][name] = parameter.shape
        filled += 2 * parameter.numel()
        total += 2 * parameter.numel()
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _drawn(draws, size, seed) for seed, (name, size) in enumerate(shard.items())}
        tensors |= {name: torch.ones_like(t) for name, t in tensors.items() if name.endswith("norm.weight")}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return total


def _drawn(draws: torch.Tensor, size: torch.Size, seed: int) -> torch.Tensor:
    """Random numbers from a stock, from another place in it for each tensor of a shard."""
    count, start = math.prod(size), seed * 7919 % len(draws)
    times = (start + count) // len(draws) + 1
    return (draws.repeat(times) if times > 1 else draws)[start : start + count].clone().reshape(size)


def write_adapter(folder: Path, shape: Shape) -> None:
    """A PEFT folder of rank 16 on every linear layer, B not zero."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config())
    config = LoraConfig(r=16, lora_alpha=16, target_modules=LINEAR, task_type="CAUSAL_LM")
    names = [name for name, _ in get_peft_model(model, config).named_parameters() if ".lora_" in name]
    shapes = {name: p.shape for name, p in model.named_parameters() if ".lora_" in name}
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"base_model.model.{name.removeprefix('base_model.model.').replace('.default', '')}": 0.02
        * torch.randn(shapes[name.removeprefix("base_model.model.")], generator=generator)
        for name in names
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    for field in fields(Shape):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    given = vars(parser.parse_args())
    work = given.pop("work")
    shape = Shape(**given)
    write_base(work / "base", shape.config(), tiny_tokenizer())
    write_adapter(work / "adapter", shape)


if __name__ == "__main__":
    main()

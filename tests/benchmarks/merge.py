"""Merging a Llama larger than half the memory: `lorakit merge`, `cp` of its base, and PEFT, from a cold cache each.

The base has Llama 3.1 8B's shapes and random weights in bfloat16, in shards of 5 GB; the adapter has rank 16 on every
linear layer of the blocks, so that 87 % of the bytes change. All is deleted afterwards: 33 GB at most are in use.
"""

import json
import math
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from lorakit.adapters.verify import forget
from tests.benchmarks import runner
from tests.benchmarks.report import table
from tests.tiny import tiny_tokenizer

SHARD = 5_000_000_000
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True)
class Shape:
    """Of a Llama."""

    hidden: int = 4096
    inner: int = 14336
    layers: int = 32
    heads: int = 32
    key_value_heads: int = 8
    vocabulary: int = 128256

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
        )


def write_base(folder: Path, shape: Shape) -> int:
    """A sharded model folder as the hub has it, and a small tokenizer; bytes of the weights."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config())
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
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shape.config().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
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


def cold(folders: list[Path]) -> None:
    """Nothing of these in the page cache; as root, nothing at all."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                forget(path)
    if os.access(CACHES, os.W_OK):
        os.sync()
        CACHES.write_text("1\n")


def merge(work: Path, repeats: int, shape: Shape = Shape()) -> str:
    """Time and peak memory of each way as a Markdown section; whatever it wrote is deleted."""
    folder = work / "merge"
    base, adapter, out = folder / "base", folder / "adapter", folder / "out"
    try:
        size = write_base(base, shape)
        write_adapter(adapter, shape)
        ran: dict[str, list[runner.Ran]] = {}
        for _ in range(repeats):
            for name, command in _commands(base, adapter, out):
                cold([base, adapter])
                try:
                    done = runner.run(command, folder / "log")
                except runner.Failed as failure:
                    print(f"merge: {name} failed:\n{failure}", flush=True)
                    continue
                finally:
                    shutil.rmtree(out, ignore_errors=True)
                ran.setdefault(name, []).append(done)
                print(f"merge: {name}: {done.seconds:.1f} s, {done.peak / 1e9:.2f} GB", flush=True)
        return _section(size, repeats, ran)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _commands(base: Path, adapter: Path, out: Path) -> Iterator[tuple[str, list[str]]]:
    ours = [sys.executable, "-m", "lorakit", "merge", str(base), str(adapter), str(out)]
    yield "cp -r", ["cp", "-r", str(base), str(out)]
    yield "lorakit merge --no-verify", [*ours, "--no-verify"]
    yield "cp -r, then sync", ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(base), str(out)]
    yield "lorakit merge", ours
    peer = [sys.executable, "-m", "tests.benchmarks.peer_merge", str(base), str(adapter), str(out)]
    yield "PEFT merge_and_unload + save_pretrained", peer


def _section(size: int, repeats: int, ran: dict[str, list[runner.Ran]]) -> str:
    median: Callable[[str], float] = lambda name: statistics.median(one.seconds for one in ran[name])  # noqa: E731
    copy = median("cp -r")
    rows = [
        [name, f"{median(name):.1f}", f"{median(name) / copy:.2f}", f"{max(one.peak for one in runs) / 1e9:.2f}"]
        for name, runs in ran.items()
    ]
    return "\n".join(
        [
            f"A Llama of {size / 2e9:.2f} B parameters in bfloat16 ({size / 1e9:.1f} GB in shards of 5 GB), LoRA r=16 "
            f"on every linear layer of its blocks. {repeats} runs each, in turn, from a cold cache; the process from "
            "start to end.",
            "",
            *table(("", "median, s", "times cp -r", "peak GB"), rows),
            "",
            "lorakit flushes what it wrote to the disk and hashes base and result in that time; `cp -r` returns with "
            "up to a fifth of the memory unwritten. With verification it also drops what it wrote from the cache, "
            "reads all of it back and recomputes every changed weight in float64; a model of this size is too large "
            "for memory in float32, so outputs are not compared.",
        ]
    )

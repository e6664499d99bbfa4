"""Make the work folder of the generation benchmark: the bases, an adapter for each, and what is asked of them.

    python -m tests.benchmarks.prepare_generate WORK --precision auto|bf16|fp32

WORK/llama and WORK/sd hold base/, adapter/ (PEFT) and task.json; WORK/sd/peer the adapter in diffusers' format.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.adapters.convert import convert
from lorakit.adapters.files import read_adapter
from lorakit.adapters.inject import adapter_state, inject
from lorakit.adapters.write import write_peft
from lorakit.families.llama.base import GROUPS, as_folder
from lorakit.families.llama.library import load_model
from lorakit.families.place import Place
from lorakit.families.sd.base import load_parts
from lorakit.families.sd.targets import UNET_GROUPS
from lorakit.recipe.schema import Adapter
from lorakit.storage.bases import resolve
from tests.benchmarks.prepare import DTYPES, precision

CPU = torch.device("cpu")
QUESTIONS = (
    "Write a long story about a lighthouse keeper who finds a map.",
    "Explain in detail how a bicycle stays upright.",
    "What does the function sorted do in Python, and how is it used with a key?",
    "Describe a day in the life of a beekeeper, hour by hour.",
    "List ten animals of the sea, each with a sentence about it.",
    "Explain the difference between a list and a tuple, with examples.",
    "Write a letter to a friend about a journey by train through the mountains.",
    "How is bread made? Describe every step.",
)
PICTURES = ("a red apple", "a cat face", "a blue heart", "a crown", "a clock", "a bus", "a house", "a tree")


def adapter(model: nn.Module, groups: Mapping[str, Any], rank: int, folder: Path, **origin: Any) -> None:
    """A PEFT folder of LoRA on attention with B drawn, not zero."""
    injection = inject(model, Adapter(rank=rank, alpha=rank, targets="attention"), groups, seed=0)
    draw = torch.Generator().manual_seed(1)
    state = adapter_state(model)
    for name in state:
        if "lora_B" in name:
            state[name].normal_(0, 0.01, generator=draw)
    write_peft(folder, state, injection, **origin)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--precision", required=True)
    given = parser.parse_args()
    dtype = DTYPES[name := precision(given.precision)]
    llama, sd = given.work / "llama", given.work / "sd"
    for folder in (llama, sd):
        folder.mkdir(parents=True)
    base = as_folder(resolve("builtin:smollm2-135m"), dtype)
    (llama / "base").symlink_to(base.path.resolve(), target_is_directory=True)
    model = load_model(base, Place(CPU, dtype), "none", attention="sdpa")
    adapter(model, GROUPS, 16, llama / "adapter", base_name="", task="CAUSAL_LM")
    (llama / "task.json").write_text(json.dumps({"precision": name, "prompts": QUESTIONS, "tokens": 96}))
    location = resolve("builtin:mini-sd")
    (sd / "base").symlink_to(location.path.resolve(), target_is_directory=True)
    unet: Any = load_parts(location, Place(CPU, torch.float32)).unet
    (sd / "adapter").mkdir()
    adapter(unet, UNET_GROUPS, 4, sd / "adapter" / "unet", base_name="")
    plain = load_parts(location, Place(CPU, torch.float32)).adaptable
    convert(read_adapter(sd / "adapter", plain), sd / "peer", "diffusers", models=plain, base_name="")
    (sd / "task.json").write_text(json.dumps({"prompts": PICTURES, "steps": 25, "guidance": 7.5}))


if __name__ == "__main__":
    main()

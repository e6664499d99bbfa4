"""Draw the generation benchmark's pictures, one at a time and all together.

    python -m tests.benchmarks.draw WORK OUT lorakit|fp32|bf16

OUT: {"one": pictures/s, "together": pictures/s} as JSON; fp32 and bf16 are the diffusers pipeline with the adapter
loaded. Loading and a first picture are not timed. lorakit draws in what its command takes on this machine.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

Draw = Callable[[Sequence[str]], None]


def lorakit(work: Path, task: dict[str, Any]) -> Draw:
    """What `lorakit generate` runs."""
    from lorakit.families.sd.drawing import DrawSettings
    from lorakit.families.sd.generate import open_painter
    from lorakit.storage.bases import resolve

    location = resolve(str((work / "base").resolve()))
    painter = open_painter(location, [(work / "adapter", 1.0)], torch.device("cpu"), torch.float32)
    settings = DrawSettings(steps=task["steps"], guidance_scale=task["guidance"])

    def draw(prompts: Sequence[str]) -> None:
        painter.draw(prompts, settings)

    return draw


def diffusers(work: Path, task: dict[str, Any], dtype: torch.dtype) -> Draw:
    """StableDiffusionPipeline with load_lora_weights, the base's own scheduler."""
    from diffusers import StableDiffusionPipeline

    make: Any = StableDiffusionPipeline
    pipeline = make.from_pretrained(work / "base", torch_dtype=dtype)
    pipeline.load_lora_weights(work / "peer")
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompts: Sequence[str]) -> None:
        pipeline(
            list(prompts),
            num_inference_steps=task["steps"],
            guidance_scale=task["guidance"],
            generator=[torch.Generator().manual_seed(0) for _ in prompts],
        )

    return draw


def main() -> None:
    work, out, who = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    task = json.loads((work / "task.json").read_text())
    if who == "lorakit":
        draw = lorakit(work, task)
    else:
        draw = diffusers(work, task, {"fp32": torch.float32, "bf16": torch.bfloat16}[who])

    def rate(calls: Sequence[Sequence[str]]) -> float:
        began = time.perf_counter()
        for prompts in calls:
            draw(prompts)
        return sum(map(len, calls)) / (time.perf_counter() - began)

    prompts = task["prompts"]
    draw(prompts[:1])
    rates = {"one": rate([[prompt] for prompt in prompts]), "together": rate([prompts])}
    out.write_text(json.dumps(rates))


if __name__ == "__main__":
    main()

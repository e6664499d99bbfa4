"""diffusers' own train_text_to_image_lora.py as a peer: run as it is, on the comparison's pictures.

    python -m tests.benchmarks.peer_script WORK OUT --variant PATH-OF-THE-SCRIPT

It draws its own noise and order, so that only its speed and memory compare. Its log call, once a step, writes
metrics.jsonl. Where torchvision is not installed, ``transforms`` below stands in for what the script takes of it.
"""

import importlib.util
import runpy
import sys
from enum import Enum
from types import ModuleType
from typing import Any

import accelerate
import datasets  # noqa: F401 (it and the next two look for torchvision when imported, and must not find the stand-in)
import diffusers  # noqa: F401
import numpy as np
import torch
import transformers  # noqa: F401
from PIL import Image

from tests.benchmarks import peer_common
from tests.benchmarks.plan import Plan, steps


class InterpolationMode(Enum):
    """The filters that Pillow has."""

    BILINEAR = Image.Resampling.BILINEAR
    LANCZOS = Image.Resampling.LANCZOS


class Compose:
    """One function after another."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def __call__(self, value: Any) -> Any:
        for part in self.parts:
            value = part(value)
        return value


def resize(side: int, interpolation: InterpolationMode) -> Any:
    """The shorter side to ``side`` pixels."""

    def scaled(picture: Image.Image) -> Image.Image:
        factor = side / min(picture.size)
        width, height = (round(length * factor) for length in picture.size)
        return picture.resize((width, height), interpolation.value)

    return scaled


def centre_crop(side: int) -> Any:
    """A square of ``side`` pixels out of the middle."""

    def cut(picture: Image.Image) -> Image.Image:
        left, top = ((length - side) // 2 for length in picture.size)
        return picture.crop((left, top, left + side, top + side))

    return cut


def to_tensor() -> Any:
    """float32 [3, H, W] in 0 .. 1."""
    return lambda picture: torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def transforms() -> Any:
    """A module with torchvision.transforms' names."""
    module: Any = ModuleType("torchvision.transforms")
    module.InterpolationMode, module.Compose, module.Resize = InterpolationMode, Compose, resize
    module.CenterCrop, module.ToTensor, module.Lambda = centre_crop, to_tensor, lambda function: function
    module.Normalize = lambda mean, deviation: lambda x: (x - mean[0]) / deviation[0]
    return module


def main() -> None:
    given = peer_common.arguments()
    plan = Plan.load(given.work)
    if importlib.util.find_spec("torchvision") is None:
        vision: Any = ModuleType("torchvision")
        vision.transforms = transforms()
        sys.modules |= {"torchvision": vision, "torchvision.transforms": vision.transforms}
    log = peer_common.StepLog(given.out)

    def record(_: Any, values: dict[str, float], **__: Any) -> None:
        log.end(values["train_loss"], plan.batch, plan.batch)

    accelerate.Accelerator.log = record  # type: ignore[method-assign]
    pictures = next(steps(given.work))[0][0].rpartition("/")[0]
    options = {
        "pretrained_model_name_or_path": given.work / "base",
        "train_data_dir": pictures,
        "resolution": 512,
        "train_batch_size": plan.batch,
        "max_train_steps": plan.steps,
        "learning_rate": plan.learning_rate,
        "adam_weight_decay": plan.weight_decay,
        "max_grad_norm": plan.clip,
        "rank": plan.rank,
        "mixed_precision": {"fp32": "no"}.get(plan.precision, plan.precision),
        "output_dir": given.out / "script",
        "cache_dir": given.out / "cache",
        "checkpointing_steps": plan.steps + 1,
        "seed": 0,
    }
    sys.argv = [given.variant, "--center_crop", *(f"--{name}={value}" for name, value in options.items())]
    runpy.run_path(given.variant, run_name="__main__")


if __name__ == "__main__":
    main()

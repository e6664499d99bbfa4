"""The data and models of the comparisons, made on the spot: chats, pictures, a Stable Diffusion of random weights."""

import json
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from tests.benchmarks.runner import ROOT

MOST_TURNS = 7
COLOURS = ("red", "orange", "gold", "green", "blue", "purple", "black", "brown")
FORMS = ("circle", "square", "triangle", "star")


def chats(folder: Path) -> Path:
    """folder/chats.jsonl: the questions and answers of recipes/python-help, one to seven of them a chat."""
    exchanges = _exchanges(folder)
    draw = random.Random(0)
    draw.shuffle(exchanges)
    lines, place = [], 0
    while place < len(exchanges):
        turns = draw.randint(1, MOST_TURNS)
        messages = [message for exchange in exchanges[place : place + turns] for message in exchange]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        place += turns
    path = folder / "chats.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def text(folder: Path) -> Path:
    """folder/text.jsonl: the same as one long text, which fills every row but the last."""
    whole = "\n".join(message["content"] for exchange in _exchanges(folder) for message in exchange)
    path = folder / "text.jsonl"
    path.write_text(json.dumps({"text": whole}) + "\n")
    return path


def _exchanges(folder: Path) -> list[list[dict[str, str]]]:
    script = ROOT / "recipes" / "python-help" / "make_chats.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True, capture_output=True)
    with (folder / "python-help.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)["messages"] for line in file]


def pictures(folder: Path, side: int, count: int) -> Path:
    """folder/pictures: ``count`` drawings of coloured forms, ``side`` pixels a side, with captions."""
    target = folder / "pictures"
    target.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        colour, form = COLOURS[number % len(COLOURS)], FORMS[number // len(COLOURS) % len(FORMS)]
        picture = Image.new("RGB", (side, side), "white")
        pen, centre = ImageDraw.Draw(picture), (side / 2, side / 2)
        reach = side * (0.2 + 0.25 * (number * 7 % 11) / 11)
        if form == "circle":
            pen.ellipse([c - reach for c in centre] + [c + reach for c in centre], fill=colour)
        else:
            pen.polygon(list(_corners(form, centre, reach)), fill=colour)
        name = f"{number:03d}.png"
        picture.save(target / name)
        rows.append({"file_name": name, "text": f"a {colour} {form}, drawing {number}"})
    (target / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


def _corners(form: str, centre: tuple[float, float], reach: float) -> Iterator[tuple[float, float]]:
    corners = {"square": 4, "triangle": 3, "star": 10}[form]
    for corner in range(corners):
        radius = reach * (0.45 if form == "star" and corner % 2 else 1)
        angle = 2 * math.pi * corner / corners - math.pi / 2
        yield centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)


def random_llama1b(folder: Path, tokenizer: Any) -> Path:
    """A model of Llama 3.2 1B's shapes (1.24 B parameters, tied) with random weights in bfloat16."""
    from tests.benchmarks.prepare_merge import Shape, write_base

    write_base(folder, Shape(2048, 8192, 16, 32, 8, tied=1).config(), tokenizer)
    return folder


def random_sd15(folder: Path, tokenizer: Path, dtype: Any) -> Path:
    """A pipeline of Stable Diffusion 1.5's shapes with random weights in ``dtype``.

    Its tokenizer is the one in ``tokenizer``, with texts padded to 77 tokens.
    """
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    make: Any = UNet2DConditionModel
    vae: Any = AutoencoderKL
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    widths = (128, 256, 512, 512)
    parts = [
        vae(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        ),
        CLIPTextModel(text),
        CLIPTokenizer.from_pretrained(tokenizer, model_max_length=77),
        make(sample_size=64, cross_attention_dim=768),
    ]
    torch.set_default_dtype(torch.float32)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler: Any = PNDMScheduler
    schedule = scheduler(**betas, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    pipeline: Any = StableDiffusionPipeline
    whole = pipeline(*parts, schedule, None, None, requires_safety_checker=False)
    whole.save_pretrained(folder)
    return folder

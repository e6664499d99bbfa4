"""Pictures as files: the settings kept inside a PNG, and a labelled grid."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from lorakit.storage import atomic
from lorakit.storage.bases import split_base_id

TILE = 128
"""Smaller pictures are enlarged by a whole factor to at least this side in a grid, so that labels fit."""
MARGIN = 6
LINES = 3


def parameters(settings: Mapping[str, Any]) -> str:
    """The settings as one text of the form that AUTOMATIC1111's web UI writes and reads."""
    lines = [" ".join(str(settings["prompt"]).split())]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {' '.join(str(settings['negative_prompt']).split())}")
    fields = {
        "Steps": settings["steps"],
        "Sampler": settings["scheduler"],
        "CFG scale": settings["guidance_scale"],
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": split_base_id(settings["base"])[0],
    }
    return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in fields.items())])


def save_picture(picture: Image.Image, settings: Mapping[str, Any], path: Path) -> None:
    """Write a PNG in one step; ``settings``, if any, in its text chunks ``parameters`` and ``lorakit`` (JSON)."""
    info = PngInfo()
    if settings:
        info.add_text("parameters", parameters(settings))
        info.add_text("lorakit", json.dumps(settings))
    out = io.BytesIO()
    picture.save(out, "PNG", pnginfo=info)
    atomic.write_bytes(path, out.getvalue())


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings that ``save_picture`` put into a PNG; None when there are none."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            settings = json.loads(picture.info["lorakit"])
    except (OSError, ValueError, KeyError, TypeError, SyntaxError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


def grid(pictures: Sequence[Image.Image], labels: Sequence[str]) -> Image.Image:
    """All pictures on one white sheet, each with its label below, near square.

    A label takes at most three lines and is cut with an ellipsis after them.
    """
    across = math.ceil(math.sqrt(len(pictures)))
    down = math.ceil(len(pictures) / across)
    width, height = (max(p.size[axis] for p in pictures) for axis in (0, 1))
    scale = math.ceil(TILE / max(width, height))
    width, height = width * scale, height * scale
    font = ImageFont.load_default(size=11)
    line = 14
    cell = (width + MARGIN, height + LINES * line + MARGIN)
    sheet = Image.new("RGB", (across * cell[0] + MARGIN, down * cell[1] + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left = MARGIN + number % across * cell[0]
        top = MARGIN + number // across * cell[1]
        enlarged = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left, top))
        for row, text in enumerate(_wrap(label, width, font)):
            draw.text((left, top + height + row * line), text, fill="black", font=font)
    return sheet


def _wrap(label: str, width: int, font: Any) -> list[str]:
    """Lines of at most ``width`` pixels, cut between words where possible."""
    lines: list[str] = []
    rest = " ".join("".join(c if c.isprintable() else " " for c in label).split())
    while rest:
        length = len(rest)
        while length > 1 and font.getlength(rest[:length]) > width:
            length -= 1
        space = rest.rfind(" ", 1, length)
        if length < len(rest) and rest[length] != " " and space > 0:
            length = space
        lines.append(rest[:length])
        rest = rest[length:].lstrip()
        if rest and len(lines) == LINES:
            lines[-1] = lines[-1][: max(0, length - 1)] + "…"
            break
    return lines

"""`lorakit generate` with a Stable Diffusion: pictures."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL.Image import Image

from lorakit.commands.batch import Batch, check_stop, make_folder
from lorakit.errors import ConflictError, RecipeError
from lorakit.families.sd.drawing import DrawSettings

IN_A_GRID = 64
"""Pictures of a grid at most, the first ones: all of a night's would not fit into memory, nor on a screen."""


def draw(batch: Batch, options: Mapping[str, Any]) -> None:
    """Numbered PNG files after those that are there already, and a grid of the first when there are several.

    ``options``: the fields of DrawSettings but the seed.
    """
    out = batch.out or Path("generated")
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir()):
        raise ConflictError("is not a folder", where=str(out), hint="give a folder for the pictures with --out")
    from lorakit.families.sd.generate import open_painter  # takes seconds, so after what is soon refused
    from lorakit.families.sd.pictures import grid, read_settings, save_picture

    place = batch.place()
    painter = open_painter(batch.location, batch.adapters, place.device, place.dtype)
    settings = DrawSettings(seed=batch.seed, **options)
    try:
        settings.check(painter.parts.size, painter.parts.factor)
    except RecipeError as error:
        error.where = f"--{error.where.replace('_', '-')}"
        raise
    jobs = painter.jobs(batch.prompts, settings)
    if batch.resume:
        done = [metadata for path in sorted(out.glob("*.png")) if (metadata := read_settings(path)) is not None]
        jobs = [job for job in jobs if painter.metadata(*job, settings) not in done]
    make_folder(out, out)
    first = 1 + max((int(p.stem) for p in out.glob("*.png") if p.stem.isdigit()), default=0)
    drawn: list[Image] = []
    labels: list[str] = []
    with batch.stoppable() as signals:
        for number, (picture, metadata) in enumerate(painter.paint(jobs, settings), start=first):
            save_picture(picture, metadata, out / f"{number:04d}.png")
            print(out / f"{number:04d}.png", flush=True)
            if len(drawn) < IN_A_GRID:
                drawn.append(picture)
                labels.append(str(metadata["prompt"]))
            check_stop(signals, out)
    if len(drawn) > 1:
        sheet = out / f"grid-{first:04d}.png"
        save_picture(grid(drawn, labels), {}, sheet)
        print(sheet)

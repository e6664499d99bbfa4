"""`lorakit generate` with a Stable Diffusion: pictures."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from PIL.Image import Image

from lorakit.commands.batch import Batch, check_stop, make_folder
from lorakit.data.pictures import SUFFIXES
from lorakit.errors import ConflictError, RecipeError
from lorakit.families.sd.drawing import DrawSettings
from lorakit.storage.atomic import alone

Job = tuple[str, int]
"""Prompt and seed of a picture."""
IN_A_GRID = 64
"""Pictures of a grid at most, the first ones: all of a night's would not fit into memory, nor on a screen."""


def draw(batch: Batch, options: Mapping[str, Any]) -> None:
    """Numbered PNG files after those that are there already, and a grid of the first when there are several; or one
    picture to the file that ``--out`` names.

    ``options``: the fields of DrawSettings but the seed.
    """
    out = batch.out or Path("generated")
    single = out.suffix.lower() in SUFFIXES and not out.is_dir()
    if single:
        _check_file(out, len(batch.prompts) * options["count"])
    elif os.path.lexists(out) and (out.is_symlink() or not out.is_dir()):
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
        done = Counter(_key(metadata) for path in out.glob("*.png") if (metadata := read_settings(path)) is not None)
        jobs = list(_missing(jobs, [_key(painter.metadata(*job, settings)) for job in jobs], done))
    folder = out.parent if single else out
    make_folder(folder, out)
    drawn: list[Image] = []
    paths: list[Path] = []
    labels: list[str] = []
    with batch.stoppable() as signals:
        for picture, metadata in painter.paint(jobs, settings):
            with alone(folder):
                if single:
                    _check_file(out, 1)
                paths.append(out if single else out / f"{_free_number(out):04d}.png")
                save_picture(picture, metadata, paths[-1])
            print(paths[-1], flush=True)
            if len(drawn) < IN_A_GRID:
                drawn.append(picture)
                labels.append(str(metadata["prompt"]))
            check_stop(signals, out)
    if len(drawn) > 1:
        more = chain([""], map("-{}".format, count(2)))
        sheets = (out / f"grid-{paths[0].stem}{again}.png" for again in more)
        sheet = next(sheet for sheet in sheets if not os.path.lexists(sheet))
        save_picture(grid(drawn, labels), {}, sheet)
        print(sheet)


def _check_file(out: Path, pictures: int) -> None:
    """RecipeError when ``out`` is not for one PNG file, ConflictError when it is there."""
    if out.suffix.lower() != ".png":
        raise RecipeError("pictures are written as PNG", where=str(out), hint="let it end in .png, or be a folder")
    if pictures != 1:
        hint = "give a folder for the pictures with --out"
        raise RecipeError(f"one file for {pictures} pictures", where=str(out), hint=hint)
    if os.path.lexists(out):
        raise ConflictError("exists already", where=str(out), hint="give another file with --out")


def _free_number(folder: Path) -> int:
    return 1 + max((int(path.stem) for path in folder.glob("*.png") if path.stem.isdecimal()), default=0)


def _missing(jobs: Sequence[Job], keys: Sequence[str], done: Counter[str]) -> Iterator[Job]:
    """The jobs without a picture; of equal ones, as many as lack one."""
    for job, key in zip(jobs, keys, strict=True):
        done[key] -= 1
        if done[key] < 0:
            yield job


def _key(metadata: Mapping[str, Any]) -> str:
    return json.dumps(metadata, sort_keys=True)

"""Which sizes pictures are brought to, and which of them are held out."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorakit.data.cache import content_key
from lorakit.data.images import Size, bucket_sizes, choose_bucket
from lorakit.data.pictures import Picture, find_pictures
from lorakit.data.records import Rejects
from lorakit.errors import DataError, RecipeError
from lorakit.recipe.schema import PictureData


def resolution_of(data: PictureData, native: Size) -> int:
    """Pixels of a side: the recipe's, or those of a square as large as the base's own (width, height)."""
    return data.resolution if data.resolution is not None else round(math.sqrt(native[0] * native[1]))


def sizes_of(data: PictureData, factor: int, native: Size) -> tuple[Size, ...]:
    """The sizes that pictures are brought to, for a VAE of ``factor`` in a base of ``native`` size.

    Raises: RecipeError when they do not fit.
    """
    resolution = resolution_of(data, native)
    step = data.bucket_step if data.buckets else resolution
    if step % factor:
        field = "data.bucket_step" if data.buckets else "data.resolution"
        raise RecipeError(f"{step} is not a multiple of {factor}, the VAE's factor", where=field)
    sizes = bucket_sizes(resolution, step)
    if not sizes:
        reason, hint = f"no bucket of {step} pixels fits a resolution of {resolution}", "lower data.bucket_step"
        raise RecipeError(reason, where="data.resolution", hint=f"{hint}, or raise data.resolution")
    return sizes if data.buckets else ((step, step),)


def held_out_ids(pictures: Sequence[Picture], share: float, seed: int) -> set[str]:
    """Which pictures are set aside: those whose name hashes lowest, so that adding others changes little.

    Never all; of a few pictures none, unless ``share`` of them is more than half a picture. One that has several
    captions counts once, and goes to one side with all of them.
    """
    names = {picture.id for picture in pictures}
    count = min(len(names) - 1, round(share * len(names)))
    return set(sorted(names, key=lambda name: content_key(seed, name))[:count])


def repeats(data: PictureData, picture: Picture) -> int:
    """How often ``picture`` comes in one epoch."""
    return picture.repeats if data.repeats == "folders" else data.repeats


@dataclass(frozen=True)
class Survey:
    """A recipe's pictures as training takes them, by their sizes alone."""

    training: Sequence[tuple[Picture, Size, Size]]
    """Each with the size (width, height) that it has, and the one that it is brought to."""
    held_out: int
    examples: Counter[Size]
    """Of one epoch, by the size that they are brought to: mirrored ones and repeats counted."""
    left_out: Sequence[DataError]
    """With on_bad "skip"."""


def survey(data: PictureData, sizes: Sequence[Size], seed: int, size_of: Callable[[Picture], Size]) -> Survey:
    """What ``data`` holds; ``size_of`` reads as much of a picture as is to be checked.

    Raises: DataError at the first bad picture, or with on_bad "skip" when none is left.
    """
    rejects = Rejects(data.on_bad)
    found: list[tuple[Picture, Size, Size]] = []
    for picture in find_pictures(data, rejects):
        try:
            size = size_of(picture)
            found.append((picture, size, sizes[choose_bucket(size, sizes)]))
        except DataError as error:
            rejects(error)
    if not found:
        raise DataError("no picture can be used", where=data.path, hint=rejects.first())
    aside = held_out_ids([picture for picture, *_ in found], data.held_out, seed)
    training = [entry for entry in found if entry[0].id not in aside]
    examples: Counter[Size] = Counter()
    for picture, _, size in training:
        examples[size] += repeats(data, picture) * (2 if data.flip else 1)
    return Survey(training, len(found) - len(training), examples, rejects.errors)

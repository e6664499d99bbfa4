"""Captions: reading a .txt file, and what a caption becomes in one step (trigger word, shuffled tags, dropout)."""

import os
import stat
from pathlib import Path

import torch

from lorakit.errors import DataError

CAPTION_BYTES = 2**20
"""Longest caption, in bytes of UTF-8."""


def clean(text: object, where: str) -> str:
    """A caption on one line with single spaces. Raises: DataError for anything but a string of at most 1 MiB."""
    if not isinstance(text, str):
        raise DataError(f"the caption is {'missing' if text is None else type(text).__name__}, not a text", where=where)
    if len(text.encode("utf-8", "surrogatepass")) > CAPTION_BYTES:
        raise DataError("the caption is longer than 1 MiB", where=where)
    return " ".join(text.split())


def read_caption(path: Path, where: str) -> str:
    """The caption in a UTF-8 file, on one line. Raises: DataError when it is no such file, or too long."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise DataError("the caption is not a regular file", where=where)
        data = file.read(CAPTION_BYTES + 4)
    try:
        return clean(data.decode("utf-8-sig"), where)
    except UnicodeDecodeError as error:
        raise DataError(f"the caption is not UTF-8 (byte {error.start})", where=where) from error


def with_trigger(caption: str, trigger: str) -> str:
    """``trigger`` and a comma in front of the caption."""
    return ", ".join(part for part in (trigger, caption) if part)


def shuffle_tags(caption: str, keep: int, generator: torch.Generator) -> str:
    """The comma-separated tags in random order, the first ``keep`` of them where they were."""
    tags = [tag.strip() for tag in caption.split(",")]
    order = torch.randperm(len(tags[keep:]), generator=generator).tolist()
    return ", ".join(tags[:keep] + [tags[keep + i] for i in order])

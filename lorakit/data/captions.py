"""Captions: what a .txt file says, and what a caption becomes in one step (trigger word, shuffled tags, dropout)."""

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


def decoded(data: bytes, where: str) -> str:
    """The caption in a file's bytes, on one line. Raises: DataError when they are not UTF-8, or too long."""
    try:
        return clean(data.decode("utf-8-sig"), where)
    except UnicodeDecodeError as error:
        raise DataError(f"the caption is not UTF-8 (byte {error.start})", where=where) from error


def with_trigger(caption: str, trigger: str) -> str:
    """``trigger`` and a comma in front of the caption, unless it stands there already, as its first tags."""
    wanted = [tag.strip() for tag in trigger.split(",")]
    if [tag.strip() for tag in caption.split(",")[: len(wanted)]] == wanted:
        return caption
    return ", ".join(part for part in (trigger, caption) if part)


def shuffle_tags(caption: str, keep: int, generator: torch.Generator) -> str:
    """The comma-separated tags in random order, the first ``keep`` of them where they were."""
    tags = [tag.strip() for tag in caption.split(",")]
    order = torch.randperm(len(tags[keep:]), generator=generator).tolist()
    return ", ".join(tags[:keep] + [tags[keep + i] for i in order])

"""Encoded pictures -> pixels: checked decoding, conversion to 8-bit sRGB, aspect-ratio buckets, resize and crop.

Sizes are (width, height) in pixels. Pillow decides what a file is by its content; the name does not count.
"""

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from lorakit.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP")
PIXEL_CAP = 2**26
"""Most pixels of a picture, read from its header before anything is decoded (8,192 x 8,192)."""
ORIENTATION = ExifTags.Base.Orientation
_PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
"""Where a PNG may say that it is turned; its pixels may stand before."""
SHAPE_CAP = 2.0
"""Longest side of a bucket, in units of ``resolution``."""

Size = tuple[int, int]
logger = logging.getLogger("lorakit")


def decode(data: bytes, where: str) -> Image.Image:
    """An encoded PNG, JPEG or WebP picture as an upright 8-bit sRGB picture (mode RGB).

    Rules: the EXIF rotation is applied; an animation gives its first frame; of 16-bit samples the high byte is kept;
    a palette is looked up; a colour profile is followed to sRGB; CMYK without one is converted by Pillow's
    formula; transparent parts are laid over white.

    Raises: DataError naming ``where`` for another format, more than PIXEL_CAP pixels, or a damaged file.
    """
    with _opened(data, where) as image:
        if image.format == "PNG":  # Pillow decodes pixels without their checksums and the end mark; this reads them
            with Image.open(io.BytesIO(data), formats=FORMATS) as twin:
                twin.verify()
        image.load()
        return _to_srgb(ImageOps.exif_transpose(image), where)


def read_size(data: bytes, where: str) -> Size:
    """Width and height of the upright picture, from its header. Raises: DataError as ``decode``, pixels aside."""
    with _opened(data, where) as image:
        marked = image.format != "PNG" or any(mark in data for mark in _PNG_EXIF)  # Pillow decodes a PNG to see
        turned = marked and image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else image.size


@contextmanager
def _opened(data: bytes, where: str) -> Iterator[Image.Image]:
    """A picture whose header is checked; whatever Pillow raises inside becomes a DataError."""
    if not data:
        raise DataError("the picture file is empty (zero bytes)", where=where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our cap below is the lower one
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_pixels(image.size, where)
                yield image
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"not a PNG, JPEG or WebP picture{_guess(data)}", where=where) from error
    except Image.DecompressionBombError as error:  # by Pillow's own cap, which is higher
        raise DataError(f"over the cap of {PIXEL_CAP:,} pixels", where=where, hint="scale the picture down") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and others
        raise DataError(f"the picture is damaged or cut off: {error}", where=where) from error


def _check_pixels(size: Size, where: str) -> None:
    if size[0] * size[1] > PIXEL_CAP:
        reason = f"{size[0]} x {size[1]} is over the cap of {PIXEL_CAP:,} pixels"
        raise DataError(reason, where=where, hint="scale the picture down")


def _guess(data: bytes) -> str:
    """What the first bytes look like, for the error message."""
    start = data[:512].lstrip()
    known = {b"<svg": "SVG", b"<?xml": "SVG or XML", b"8BPS": "PSD", b"%!PS": "EPS", b"GIF8": "GIF", b"BM": "BMP"}
    known |= {b"II*\0": "TIFF", b"MM\0*": "TIFF", b"%PDF": "PDF"}
    for magic, name in known.items():
        if start.startswith(magic):
            return f" (it looks like {name})"
    return " (it looks like HEIC or AVIF)" if data[4:8] == b"ftyp" else ""


def _to_srgb(image: Image.Image, where: str) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):
        samples = np.asarray(image).astype(np.uint32)
        image = Image.fromarray((samples >> 8).clip(max=255).astype(np.uint8))
    elif image.mode in ("P", "PA", "LA") or "transparency" in image.info:
        image = image.convert("RGBA")
    alpha = image.getchannel("A") if "A" in image.getbands() else None
    colour = image.convert("RGB") if alpha is not None or image.mode not in ("RGB", "L", "CMYK") else image
    if profile:
        colour = _follow_profile(colour, profile, where)
    colour = colour.convert("RGB")
    if alpha is None:
        return colour
    white = Image.new("RGB", colour.size, (255, 255, 255))
    return Image.composite(colour, white, alpha)


def _follow_profile(image: Image.Image, profile: bytes, where: str) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        logger.warning("%s: its colour profile cannot be used and its numbers are taken as sRGB: %s", where, error)
        return image
    return converted if converted is not None else image


def bucket_sizes(resolution: int, step: int) -> tuple[Size, ...]:
    """All sizes of multiples of ``step`` with at most resolution^2 pixels that no larger such size contains.

    Sides are at most twice the resolution. The order is by width.
    """
    longest = int(SHAPE_CAP * resolution)
    sizes = []
    for width in range(step, longest + 1, step):
        height = min(resolution**2 // width, longest) // step * step
        if height >= step:
            sizes.append((width, height))
    kept = {s for s in sizes if not any(o != s and o[0] >= s[0] and o[1] >= s[1] for o in sizes)}
    return tuple(sorted(kept))


def choose_bucket(size: Size, buckets: Sequence[Size]) -> int:
    """Index of the bucket that loses the least of a picture of ``size`` when scaled to cover it and cropped.

    The share kept is the smaller of the two aspect ratios over the larger; of equals the largest bucket wins.
    """

    def kept(bucket: Size) -> tuple[float, int]:
        across, down = size[0] * bucket[1], size[1] * bucket[0]
        return min(across, down) / max(across, down), bucket[0] * bucket[1]

    return max(range(len(buckets)), key=lambda i: kept(buckets[i]))


def fit(image: Image.Image, size: Size, place: tuple[float, float], mirror: bool) -> NDArray[np.uint8]:
    """Scale ``image`` (Lanczos) to cover ``size``, cut the excess, mirror if asked: uint8 [height, width, 3].

    ``place``: where the cut-out lies in the excess, 0 (left, top) to 1 (right, bottom); 0.5 is the centre.
    """
    scale = max(size[0] / image.width, size[1] / image.height)
    width, height = min(size[0] / scale, image.width), min(size[1] / scale, image.height)
    left, top = (image.width - width) * place[0], (image.height - height) * place[1]
    scaled = image.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
    array: NDArray[Any] = np.asarray(scaled)
    return np.ascontiguousarray(array[:, ::-1] if mirror else array)


def cut_out(size: Size, bucket: Size, place: tuple[float, float], mirror: bool) -> tuple[int, ...]:
    """What ``fit`` does to a picture of ``size``, as SDXL is told it (Podell et al. 2023, arXiv:2307.01952).

    Height and width before scaling, top and left of the cut-out in the scaled picture (mirrored where it is mirrored),
    height and width of the cut-out, all in pixels.
    """
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    across, down = (side * scale - kept for side, kept in zip(size, bucket, strict=True))
    left = across * (1 - place[0] if mirror else place[0])
    return size[1], size[0], round(down * place[1]), round(left), bucket[1], bucket[0]

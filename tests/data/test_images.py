"""Decoding against pixels computed by hand, buckets against brute force, and every bad picture refused by name."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from lorakit.data import images
from lorakit.errors import DataError

ROWS, COLUMNS = np.mgrid[0:160:10, 0:240:10]
GRADIENT = np.stack([COLUMNS, ROWS, np.full((16, 24), 77)], -1).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def picture() -> Image.Image:
    return Image.fromarray(GRADIENT)


def pixels(data: bytes) -> np.ndarray:
    image = images.decode(data, "a.png")
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 100})])
def test_the_three_formats(kind: str, options: dict[str, object]) -> None:
    difference = np.abs(pixels(encoded(picture(), kind, **options)) - GRADIENT)
    assert difference.max() <= (16 if kind == "JPEG" else 0)
    assert difference.mean() < 3


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PDF", "EPS"])
def test_other_formats_are_refused_whatever_their_name(kind: str) -> None:
    with pytest.raises(DataError, match="not a PNG, JPEG or WebP picture"):
        images.decode(encoded(picture(), kind), "renamed.png")


def test_a_renamed_svg_is_named() -> None:
    with pytest.raises(DataError, match="looks like SVG") as caught:
        images.decode(b'<svg xmlns="http://www.w3.org/2000/svg"/>', "drawing.png")
    assert caught.value.where == "drawing.png"
    with pytest.raises(DataError, match="looks like HEIC"):
        images.decode(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), "IMG_1.jpg")


@pytest.mark.parametrize("kind", images.FORMATS)
def test_cut_off_and_empty_files(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    whole = encoded(noise, kind)
    for length in (0, 1, 20, len(whole) // 2, len(whole) - 30):
        with pytest.raises(DataError) as caught:
            images.decode(whole[:length], "cut.png")
        assert caught.value.where == "cut.png"


def png(side: tuple[int, int], bits: int, body: bytes) -> bytes:
    """A PNG in RGB by hand."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", *side, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def jpeg_bomb() -> bytes:
    data = bytearray(encoded(picture(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65_535, 65_535)
    return bytes(data)


def webp_bomb() -> bytes:
    data = bytearray(encoded(picture(), "WEBP"))
    sides = data.index(b"\x9d\x01\x2a") + 3
    data[sides : sides + 4] = struct.pack("<HH", 16_383, 16_383)
    return bytes(data)


@pytest.mark.parametrize(
    "bomb", [*(png((side, side), 8, b"") for side in (8193, 20_000, 2**31 - 1)), jpeg_bomb(), webp_bomb()]
)
def test_a_bomb_is_refused_by_its_header(bomb: bytes) -> None:
    with pytest.raises(DataError, match="cap of 67,108,864 pixels"):
        images.decode(bomb, "bomb.png")


def test_exif_rotation_is_applied() -> None:
    for orientation, expected in {
        1: GRADIENT,
        2: GRADIENT[:, ::-1],
        3: GRADIENT[::-1, ::-1],
        4: GRADIENT[::-1],
        5: GRADIENT.transpose(1, 0, 2),
        7: GRADIENT[::-1, ::-1].transpose(1, 0, 2),
        6: np.rot90(GRADIENT, -1),
        8: np.rot90(GRADIENT),
    }.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = encoded(picture(), "PNG", exif=exif)
        assert np.array_equal(pixels(turned), expected), orientation
        assert images.read_size(turned, "a.png") == expected.shape[1::-1]


def test_xmp_rotation_is_applied() -> None:
    told = PngInfo()
    told.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    turned = encoded(picture(), "PNG", pnginfo=told)
    assert np.array_equal(pixels(turned), np.rot90(GRADIENT, -1))
    assert images.read_size(turned, "a.png") == (16, 24)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_size_needs_the_header_alone(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (90, 70, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    assert images.read_size(data[: len(data) // 2], "a") == (70, 90)


def test_alpha_is_laid_over_white() -> None:
    alpha = np.broadcast_to(np.array([0, 51, 255] * 8, np.uint8), (16, 24))
    rgba = Image.fromarray(np.dstack([GRADIENT, alpha]))
    share = alpha[..., None] / 255
    expected = GRADIENT * share + 255 * (1 - share)
    assert np.abs(pixels(encoded(rgba)) - expected).max() <= 1
    gray = Image.merge("LA", [Image.fromarray(GRADIENT[..., 0].copy()), Image.fromarray(alpha.copy())])
    assert np.abs(pixels(encoded(gray)) - expected[..., :1]).max() <= 1


def test_palettes_with_and_without_a_transparent_entry() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    assert pixels(encoded(palette)).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert pixels(encoded(palette, transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    assert pixels(encoded(palette, transparency=bytes([255, 0]))).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_sixteen_bits_keep_the_high_byte_and_bilevel_is_black_and_white() -> None:
    deep = Image.fromarray(np.array([[0, 255, 256, 32_768, 65_535]], np.uint16))
    assert pixels(encoded(deep))[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    colours = struct.pack(">B6H", 0, 0, 255, 256, 32_768, 65_535, 511)
    assert pixels(png((2, 1), 16, zlib.compress(colours))).tolist() == [[[0, 0, 1], [128, 255, 1]]]
    bilevel = Image.fromarray(np.array([[False, True]]))
    assert pixels(encoded(bilevel)).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_cmyk_by_the_plain_formula() -> None:
    ink = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert np.abs(pixels(encoded(ink, "JPEG", quality=100)) - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (9, 5), c) for c in ("red", "lime", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, lossless=True)
    assert (pixels(data) == [255, 0, 0]).all()


def test_a_colour_profile_is_followed() -> None:
    linear = _gamma_profile(1.0)
    data = encoded(Image.new("RGB", (4, 4), (55, 128, 200)), icc_profile=linear)
    x = np.array([55, 128, 200]) / 255
    expected = 255 * np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)
    assert np.abs(pixels(data) - expected).max() <= 2
    same = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.abs(pixels(encoded(picture(), icc_profile=same)) - GRADIENT).max() <= 1


def _gamma_profile(gamma: float) -> bytes:
    """An ICC matrix profile with sRGB's primaries (D50-adapted) and a plain power curve."""

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(number, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"g\0" + b"\0" * 78
    body = {
        b"desc": text + b"\0" * (-len(text) % 4),
        b"cprt": b"text\0\0\0\0cc0\0",
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.4360, 0.2225, 0.0139),
        b"gXYZ": xyz(0.3851, 0.7169, 0.0971),
        b"bXYZ": xyz(0.1431, 0.0606, 0.7141),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    offset = 128 + 4 + 12 * len(body)
    table, data = struct.pack(">I", len(body)), b""
    for name, block in body.items():
        table += name + struct.pack(">II", offset + len(data), len(block))
        data += block
    size = offset + len(data)
    header = struct.pack(">I4sI4s4s4s", size, b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ ") + b"\0" * 12 + b"acsp"
    header += b"\0" * 28 + number(0.9642) + number(1.0) + number(0.8249)
    return header.ljust(128, b"\0") + table + data


def test_a_broken_colour_profile_is_told_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    assert np.array_equal(pixels(encoded(picture(), icc_profile=b"not a profile")), GRADIENT)
    assert "colour profile" in caplog.text


@given(st.integers(64, 600), st.sampled_from([8, 16, 32, 64]), st.integers(1, 4000), st.integers(1, 4000))
def test_buckets_hold_their_bounds_and_lose_least(resolution: int, step: int, width: int, height: int) -> None:
    buckets = images.bucket_sizes(resolution, step)
    assert all(w % step == h % step == 0 and w * h <= resolution**2 for w, h in buckets)
    assert all(max(size) <= 2 * resolution for size in buckets)
    assert {(h, w) for w, h in buckets} == set(buckets)
    assert not any(a != b and a[0] <= b[0] and a[1] <= b[1] for a, b in itertools.product(buckets, buckets))

    def lost(bucket: tuple[int, int]) -> float:
        scale = max(bucket[0] / width, bucket[1] / height)
        return 1 - bucket[0] * bucket[1] / (width * height * scale**2)

    chosen = buckets[images.choose_bucket((width, height), buckets)]
    assert lost(chosen) <= min(map(lost, buckets)) + 1e-9


def test_known_buckets() -> None:
    half = [(32, 128), (40, 96), (48, 80), (56, 72)]
    assert images.bucket_sizes(64, 8) == (*half, (64, 64), (72, 56), (80, 48), (96, 40), (128, 32))
    assert images.bucket_sizes(64, 64) == ((64, 64),)
    assert images.bucket_sizes(32, 64) == ()


def test_fit_cuts_where_it_is_told_and_mirrors() -> None:
    wide = Image.fromarray(np.repeat(np.arange(32, dtype=np.uint8)[None, :, None] * 8, 16, 0).repeat(3, 2))
    for place, first in ((0.0, 0), (0.5, 8), (1.0, 16)):
        cut = images.fit(wide, (16, 16), (place, place), mirror=False)
        assert cut.shape == (16, 16, 3)
        assert cut[0, :, 0].tolist() == [8 * (first + i) for i in range(16)]
    mirrored = images.fit(wide, (16, 16), (0.0, 0.0), mirror=True)
    assert mirrored[3, :, 1].tolist() == [8 * i for i in reversed(range(16))]


def test_fit_scales_like_pillow() -> None:
    image = picture()
    ours = images.fit(image, (12, 8), (0.5, 0.5), mirror=False)
    assert np.array_equal(ours, np.asarray(image.resize((12, 8), Image.Resampling.LANCZOS)))

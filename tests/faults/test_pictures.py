"""Faults 11 to 16, 19 to 21 and 23 in pictures and captions, by training and by ``lorakit data``."""

import io
import json
import os
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from lorakit.data.tables import ParquetTable
from lorakit.errors import DataError
from tests.faults.harness import Told, forked, lorakit, untouched


def refuse(folder: Path, *words: str) -> Told:
    """Both commands that read pictures refuse with exit code 3 and leave everything as it is."""
    for command in ("train-sd", "data"):
        with untouched(folder):
            told = lorakit(command, folder / "recipe.yaml").refused(3, *words)
    return told


def skipped(folder: Path, *words: str) -> None:
    """With ``on_bad: skip`` training goes on, and names and counts what it left out."""
    changes = ("data.on_bad=skip", "train.steps=1", f"output.name=skipped{len(list((folder / 'runs').glob('*')))}")
    told = lorakit("train-sd", folder / "recipe.yaml", *(word for change in changes for word in ("--set", change)))
    assert told.code == 0, told.err
    line = next(line for line in told.err.splitlines() if "left out" in line)
    assert [word for word in ("1 picture", *words) if word not in line] == []


def replace(folder: Path, content: bytes, name: str = "1.png") -> None:
    (folder / "pictures" / name).write_bytes(content)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.fault(11)
def test_11_empty_folder(sd: Path) -> None:
    for path in (sd / "pictures").iterdir():
        path.unlink()
    refuse(sd, f"{sd}/pictures", "no picture")
    (sd / "pictures").rmdir()
    refuse(sd, f"{sd}/pictures", "no such file or folder")


@pytest.mark.fault(12)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_12_truncated_image(sd: Path, kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    whole = encoded(noise, kind)
    for size in (10, len(whole) // 2, len(whole) - 20, len(whole) - 8):
        replace(sd, whole[:size])
        refuse(sd, "1.png")
    skipped(sd, "1.png")


@pytest.mark.fault(12)
def test_12_image_of_zero_bytes(sd: Path) -> None:
    replace(sd, b"")
    refuse(sd, "1.png", "zero bytes")
    skipped(sd, "1.png", "zero bytes")


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def bomb(side: int) -> bytes:
    """A whole PNG of side x side black pixels in about a thousandth of its bytes."""
    packer = zlib.compressobj(9)
    rows = packer.compress(b"\0" * (side // 8 + 1) * side) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.fault(13)
def test_13_decompression_bomb(sd: Path) -> None:
    replace(sd, bomb(30_000))
    assert (sd / "pictures/1.png").stat().st_size < 200_000
    refuse(sd, "1.png", "pixels")
    skipped(sd, "1.png", "pixels")
    forked("data", sd / "recipe.yaml", megabytes=300).refused(3, "pixels")


@pytest.mark.fault(13)
def test_13_a_bomb_in_text_and_colour_chunks(sd: Path) -> None:
    """64 MiB of zeros in a compressed text chunk, and as a colour profile."""
    packed = zlib.compress(b"\0" * 2**26, 9)
    head, tail = (whole := (sd / "pictures/1.png").read_bytes())[:33], whole[33:]
    replace(sd, head + chunk(b"zTXt", b"Comment\0\0" + packed) + tail)
    forked("data", sd / "recipe.yaml", megabytes=300).refused(3, "1.png")
    replace(sd, head + chunk(b"iCCP", b"profile\0\0" + packed) + tail)
    told = forked("data", sd / "recipe.yaml", megabytes=300)
    assert told.code in (0, 3), told.err
    assert "Traceback" not in told.err


@pytest.mark.fault(14)
@pytest.mark.parametrize(
    ("content", "name"),
    [
        (
            b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
            "SVG",
        ),
        (b"8BPS\0\1" + b"\0" * 6 + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + b"\0" * 400, "PSD"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(touch canary) (w) file\nshowpage\n", "EPS"),
        (encoded(Image.new("RGB", (8, 8)), "TIFF"), "TIFF"),
        (encoded(Image.new("RGB", (8, 8)), "BMP"), "BMP"),
        (encoded(Image.new("P", (8, 8)), "GIF"), "GIF"),
    ],
)
def test_14_renamed_file_of_another_kind(sd: Path, content: bytes, name: str) -> None:
    for suffix in (".png", ".jpg", ".webp"):
        (sd / "pictures/1.png").rename(sd / f"pictures/1{suffix}")
        replace(sd, content, f"1{suffix}")
        refuse(sd, f"1{suffix}", "not a PNG, JPEG or WebP picture", f"looks like {name}")
        (sd / f"pictures/1{suffix}").rename(sd / "pictures/1.png")


@pytest.mark.fault(15)
def test_15_odd_pictures_are_converted(sd: Path) -> None:
    """Each trains; the rules themselves are tested pixel by pixel in tests/data/test_images.py."""
    plain, exif = Image.new("RGB", (40, 32), "red"), Image.Exif()
    exif[0x0112] = 6
    odd = {
        "cmyk.jpg": encoded(Image.new("CMYK", (40, 32), (0, 255, 255, 0)), "JPEG"),
        "deep.png": encoded(Image.fromarray(np.full((32, 40), 40_000, np.uint16))),
        "alpha.png": encoded(Image.new("RGBA", (40, 32), (255, 0, 0, 100))),
        "turned.jpg": encoded(plain, "JPEG", exif=exif),
        "moving.webp": encoded(plain, "WEBP", save_all=True, append_images=[Image.new("RGB", (40, 32))], duration=50),
        "palette.png": encoded(Image.new("P", (40, 32))),
        "bilevel.png": encoded(Image.new("1", (40, 32))),
    }
    for name, content in odd.items():
        replace(sd, content, name)
        (sd / "pictures" / name).with_suffix(".txt").write_text(name)
    told = lorakit("data", sd / "recipe.yaml", "--rows", "20")
    assert told.code == 0, told.err
    assert "turned.jpg: 32 x 40" in told.out.replace("\n", "")
    assert lorakit("train-sd", sd / "recipe.yaml").code == 0


@pytest.mark.fault(16)
@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "no caption"), (b"caf\xe9", "not UTF-8 (byte 3)"), (b"a" * (2**20 + 1), "longer than 1 MiB")],
)
def test_16_bad_caption(sd: Path, content: bytes | None, told: str) -> None:
    caption = sd / "pictures/1.txt"
    caption.unlink() if content is None else caption.write_bytes(content)
    refuse(sd, "1.txt", told)
    skipped(sd, "1.txt", told)


@pytest.mark.fault(16)
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: path.symlink_to("absent.txt"), "No such file"),
        (lambda path: path.symlink_to(path.name), "cannot be read"),
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.symlink_to("/etc/hostname"), "outside the data set's folder"),
    ],
    ids=["missing", "loop", "pipe", "outside"],
)
def test_16_caption_that_is_no_file(sd: Path, make: Callable[[Path], None], told: str) -> None:
    caption = sd / "pictures/1.txt"
    caption.unlink()
    make(caption)
    refuse(sd, "1.txt", told)
    skipped(sd, "1.txt", told)


@pytest.mark.fault(16, 17)
def test_17_metadata_with_a_wrong_line(sd: Path) -> None:
    lines = [f'{{"file_name": "{i}.png", "text": "colour {i}"}}\n' for i in range(4)]
    for wrong, told in {
        '{"file_name": "1.png"}\n': "no field 'text'",
        '{"file_name": "1.png", "text": null}\n': "missing",
        '{"file_name": "1.png", "text": 3}\n': "int, not a text",
        '{"file_name": "1.png", "text": \n': "bad JSON",
        '{"file_name": 1, "text": "a"}\n': "file_name is not a name",
        '["1.png", "a"]\n': "found list",
    }.items():
        (sd / "pictures/metadata.jsonl").write_text("".join([lines[0], wrong, *lines[2:]]))
        refuse(sd, "metadata.jsonl:2", told)
        skipped(sd, "metadata.jsonl:2", told)


def table(folder: Path, **columns: list[object]) -> Path:
    path = folder / "pictures.parquet"
    pictures = [(folder / f"pictures/{i}.png").read_bytes() for i in range(4)]
    given = {"image": pictures, "text": ["red", "green", "blue", "white"]} | columns
    parquet.write_table(pyarrow.table({name: given[name] for name in given if given[name]}), path, row_group_size=2)
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("/pictures\n", "/pictures.parquet\n"))
    return path


@pytest.mark.fault(19)
def test_19_parquet_with_a_corrupt_footer_or_pages(sd: Path) -> None:
    path = table(sd)
    whole = path.read_bytes()
    assert lorakit("data", sd / "recipe.yaml").code == 0
    for size in (0, 4, len(whole) // 2, len(whole) - 4):
        path.write_bytes(whole[:size])
        refuse(sd, "pictures.parquet", "not a sound parquet file")
    for length in (2**31 - 1, 2**32 - 1, 0):
        path.write_bytes(whole[:-8] + struct.pack("<I", length) + b"PAR1")
        refuse(sd, "pictures.parquet")
    path.write_bytes(whole[:30] + os.urandom(len(whole) // 2 - 30) + whole[len(whole) // 2 :])
    assert lorakit("data", sd / "recipe.yaml").code == 3


@pytest.mark.fault(19)
@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"text": []}, "no column 'text'"),
        ({"image": []}, "no column 'image'"),
        ({"text": [1, 2, 3, 4]}, "int, not a text"),
        ({"text": ["a", None, "b", "c"]}, "missing"),
        ({"image": [1, 2, 3, 4]}, "neither a picture's bytes nor a file's name"),
        ({"image": [None] * 4}, "no column 'image'"),
    ],
)
def test_19_parquet_of_another_schema(sd: Path, columns: dict[str, list[object]], told: str) -> None:
    table(sd, **columns)
    if columns == {"image": [None] * 4}:
        told = "neither a picture's bytes nor a file's name"
    refuse(sd, "pictures.parquet", told)


@pytest.mark.fault(20)
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("../secret.png", "outside the data set's folder"),
        ("/etc/passwd", "outside the data set's folder"),
        ("link.png", "outside the data set's folder"),
        ("folder/0.png", "outside the data set's folder"),
        ("https://localhost/a.png", "a URL"),
        ("file:///etc/passwd", "a URL"),
        ("data:image/png;base64,AAAA", "a URL"),
        ("pipe.png", "not a regular file"),
        ("loop.png", "cannot be read"),
        ("nul\\u0000.png", "cannot be read"),
        ("none.png", "cannot be read"),
        ("a" * 300, "cannot be read"),
    ],
)
def test_20_paths_that_lead_elsewhere(sd: Path, name: str, told: str) -> None:
    pictures = sd / "pictures"
    (sd / "elsewhere").mkdir()
    for place in (sd / "secret.png", sd / "elsewhere/0.png"):
        place.write_bytes((pictures / "0.png").read_bytes())
    (pictures / "link.png").symlink_to("../secret.png")
    (pictures / "folder").symlink_to("../elsewhere")
    (pictures / "loop.png").symlink_to("loop.png")
    os.mkfifo(pictures / "pipe.png")
    (pictures / "metadata.jsonl").write_text(f'{{"file_name": "{name}", "text": "a"}}\n')
    refuse(sd, "metadata.jsonl:1", told)
    (pictures / "metadata.jsonl").unlink()
    table(sd, image=[{"bytes": None, "path": name.replace("\\u0000", "\0")}] * 4)
    if name not in ("link.png", "folder/0.png", "loop.png", "pipe.png"):  # these are not beside the parquet file
        refuse(sd, "pictures.parquet", told)


@pytest.mark.fault(20)
def test_20_links_pipes_and_devices_in_a_plain_folder(sd: Path) -> None:
    (sd / "secret.png").write_bytes((sd / "pictures/0.png").read_bytes())
    (sd / "secret.txt").write_text("secret words")
    picture, caption = sd / "pictures/1.png", sd / "pictures/1.txt"
    for path, target in ((picture, "../secret.png"), (picture, "/dev/zero"), (caption, "../secret.txt")):
        whole = path.read_bytes()
        path.unlink()
        path.symlink_to(target)
        refuse(sd, path.name)
        path.unlink()
        path.write_bytes(whole)
    for path in (picture, caption):
        whole = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        refuse(sd, path.name, "not a regular file")
        path.unlink()
        path.write_bytes(whole)


@pytest.mark.fault(20)
def test_20_a_list_of_pictures_that_lies_elsewhere(sd: Path) -> None:
    (sd / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a secret"}\n')
    (sd / "pictures/metadata.jsonl").symlink_to("../metadata.jsonl")
    refuse(sd, "metadata.jsonl", "outside the data set's folder")


@pytest.mark.fault(23)
def test_23_control_characters_in_the_bases_name(sd: Path) -> None:
    name = "base\x1b[31m\nlorakit: error: forged"
    (sd / "base").rename(sd / name)
    told = lorakit("train-sd", sd / "recipe.yaml", "--set", f"base.model={json.dumps(str(sd / name))}")
    assert told.code == 0, told.err
    assert "\x1b[31m" not in told.out + told.err
    assert r"base\x1b[31m\nlorakit" in told.err
    assert not [line for line in (told.out + told.err).splitlines() if line.startswith("lorakit: error")]


@pytest.mark.fault(23)
def test_23_control_characters_in_names(sd: Path) -> None:
    name = "red\x1b[31m\nlorakit: error: forged"
    (sd / "pictures" / f"{name}.png").write_bytes(b"not a picture")
    (sd / "pictures" / f"{name}.txt").write_text("a\x1b[31mb")
    refuse(sd, r"red\x1b[31m\nlorakit: error: forged.png")
    skipped(sd, r"red\x1b[31m\nlorakit")
    shown = lorakit("data", sd / "recipe.yaml", "--set", "data.on_bad=skip")
    assert "\x1b[31m" not in shown.out + shown.err


@pytest.mark.fault(23)
def test_23_names_that_are_not_unicode(sd: Path) -> None:
    with open(os.fsencode(sd / "pictures") + b"/\xff\xfe.png", "wb") as file:
        file.write(b"not a picture")
    (sd / "pictures" / os.fsdecode(b"\xff\xfe.txt")).write_text("a caption")
    refuse(sd, r"\udcff\udcfe.png")


@pytest.mark.fault(21)
def test_21_a_picture_table_that_changes_while_it_is_read(sd: Path) -> None:
    """A reader that maps the file into its memory would be killed (SIGBUS) when it is cut short."""
    path = table(sd)
    opened = ParquetTable(path, "image", "text")
    os.truncate(path, 100)
    with pytest.raises(DataError, match="changed while it was read") as caught:
        opened.image(3)
    assert caught.value.where == str(path)


@pytest.mark.fault(21)
def test_21_a_picture_that_changes_while_it_is_read(sd: Path) -> None:
    """Someone writes to it all the while; whatever is read is refused by name or sound, never half of each."""
    path, done = sd / "pictures/1.png", threading.Event()
    path.write_bytes(path.read_bytes() + b"\0" * 2**24)

    def change() -> None:
        with path.open("r+b") as file:
            while not done.is_set():
                file.seek(2**23)
                file.write(os.urandom(1000))
                file.flush()

    writer = threading.Thread(target=change)
    writer.start()
    try:
        told = lorakit("data", sd / "recipe.yaml")
    finally:
        done.set()
        writer.join()
    told.refused(3, "1.png", "changed while it was read")


@pytest.mark.fault(20)
def test_20_captions_that_are_pictures(sd: Path) -> None:
    """A datasets folder whose caption column would make the library open a file or a URL a row."""
    paths = [str(sd / f"pictures/{i}.png") for i in range(4)]
    made = datasets.Dataset.from_dict({"image": paths, "text": paths}).cast_column("text", datasets.Image())
    made.save_to_disk(sd / "set")
    recipe = sd / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(f"{sd}/pictures", f"{sd}/set"))
    refuse(sd, "the column 'text' holds no captions")

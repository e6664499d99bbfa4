"""Finding the pictures of a data set and their captions: folders, metadata files, parquet, datasets folders, hub ids.

A picture is found with its caption checked; its bytes are read when asked for. Nothing outside the data's own folder is
ever opened, and only regular files are.
"""

import logging
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lorakit.data.captions import CAPTION_BYTES, clean, decoded
from lorakit.data.records import HUB_ID, Rejects, read_records
from lorakit.data.stamp import Stamp
from lorakit.data.tables import ParquetTable, load_datasets_folder, load_hub_table
from lorakit.errors import DataError, shown
from lorakit.recipe.schema import PictureData

SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".svg", ".psd", ".avif", ".heic")
)
"""Names that claim to be a picture; the content decides whether it is one that can be used."""
METADATA = ("metadata.jsonl", "metadata.csv")
BESIDE = frozenset(
    (".txt", ".json", ".jsonl", ".csv", ".caption", ".npz", ".npy", ".pt", ".safetensors", ".toml", ".yaml", ".yml")
)
"""What other trainers keep beside a picture, under its name."""
MASKS = ("-masklabel", "-condlabel")
"""What OneTrainer's masks and conditions are called, behind the picture's name."""
FILE_CAP = 2**28
"""Largest picture file, in bytes (256 MiB)."""

logger = logging.getLogger("lorakit")


@dataclass(frozen=True)
class Picture:
    """One picture of a data set: its name for messages, its caption, and a way to its bytes (which may fail)."""

    id: str
    caption: str
    read: Callable[[], bytes]
    repeats: int = 1
    """By the number that the name of a folder around it begins with."""


class Table(Protocol):
    """Rows that hold a picture and a caption each."""

    name: str
    roots: Sequence[Path]

    def captions(self) -> Iterator[object]: ...

    def image(self, row: int) -> object:
        """Bytes, or a mapping with ``bytes`` or ``path``."""
        ...


def find_pictures(data: PictureData, rejects: Rejects) -> list[Picture]:
    """All pictures of ``data.path``, in an order that depends on their names only.

    Raises: DataError when there is nothing at the path, nothing in it, or (by ``rejects``) at the first bad picture.
    """
    path = Path(data.path).expanduser()
    is_folder, is_file = os.path.isdir(path), os.path.isfile(path)  # Path's own raise where a name is too long
    if is_folder and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        found = list(_from_table(load_datasets_folder(path, data), rejects))
    elif is_folder and (tables := [path / name for name in METADATA if (path / name).is_file()]):
        if not tables[0].resolve().is_relative_to(path.resolve()):
            raise DataError(f"outside the data set's folder: {shown(tables[0].name)}", where=shown(tables[0]))
        found = list(_from_metadata(tables[0], data.caption_column, rejects))
        named = {Path(picture.id).as_posix() for picture in found}
        pictures = (shown(p.relative_to(path).as_posix()) for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not rejects.errors and (unnamed := sorted(set(pictures) - named)):
            told = "%d pictures are not named in %s, and left out: %s"
            logger.warning(told, len(unnamed), shown(tables[0]), ", ".join(unnamed[:3]))
    elif is_folder:
        found = list(_from_folder(path, rejects, warn=data.repeats != "folders"))
    elif is_file and path.suffix == ".parquet":
        found = list(_from_table(ParquetTable(path, data.image_column, data.caption_column), rejects))
    elif is_file and path.suffix in (".jsonl", ".csv"):
        found = list(_from_metadata(path, data.caption_column, rejects))
    elif not os.path.exists(path) and HUB_ID.fullmatch(data.path):
        found = list(_from_table(load_hub_table(data), rejects))
    else:
        kinds = "neither a folder nor a .parquet, .jsonl or .csv file"
        raise DataError(kinds if os.path.lexists(path) else "no such file or folder", where=shown(data.path))
    if not found:
        raise DataError("no picture with a caption was found", where=shown(data.path), hint=rejects.first())
    return found


def read_inside(root: Path, name: str, where: str, most: int = FILE_CAP) -> bytes:
    """The bytes of a regular file ``name`` below ``root``.

    Raises: DataError for a URL, an absolute path, a path or link that leads outside, a pipe, a device, a missing file,
    or one of more than ``most`` bytes.
    """
    label = shown(name)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name) or name.startswith("data:"):
        raise DataError(f"a URL, not a file of the data set: {label}", where=where)
    outside = DataError(f"outside the data set's folder: {label}", where=where)
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise outside
    try:
        base = root.resolve(strict=True)
        path = (base / name).resolve(strict=True)
        if not path.is_relative_to(base):
            raise outside
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"not a regular file: {label}", where=where)
            if status.st_size > most:
                raise DataError(f"longer than {most >> 20} MiB: {label}", where=where)
            content = file.read(most)
            Stamp.of(status).check(os.fstat(file.fileno()), where)
            return content
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a NUL in the name; RuntimeError: a loop of links
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"cannot be read: {label}: {reason}", where=where) from error


def _from_folder(root: Path, rejects: Rejects, *, warn: bool) -> Iterator[Picture]:
    """Every file named like a picture, or with a .txt or .caption of the same name next to it.

    Hidden files are left out, and the masks that OneTrainer keeps beside pictures.
    """
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if not p.is_dir())
    for link in sorted(p for p in root.rglob("*") if p.is_symlink() and p.is_dir()):
        error = DataError("a link to a folder, which is not followed", where=shown(link.relative_to(root).as_posix()))
        rejects(error)
    known = set(names)
    repeats = {part for name in names for part in Path(name).parts[:-1] if _repeats(part)}
    if repeats and warn:
        told = "%s: the number is no repeat count unless data.repeats is folders; every picture counts alike"
        logger.warning(told, ", ".join(map(shown, sorted(repeats)[:3])))
    masks = several = 0
    for name in names:
        path = Path(name)
        beside = [path.with_suffix(suffix).as_posix() for suffix in (".txt", ".TXT", ".caption")]
        caption = next((other for other in beside if other in known), beside[0])
        if any(part.startswith(".") for part in path.parts) or path.suffix.lower() in BESIDE:
            continue
        if path.suffix.lower() not in SUFFIXES and caption not in known:
            continue
        if path.stem.endswith(MASKS):
            masks += 1
            continue
        label = shown(name)
        try:
            if caption not in known:
                hint = "an empty one will do, with data.trigger"
                raise DataError(f"no caption: there is no {shown(caption)}", where=label, hint=hint)
            said = read_inside(root, caption, shown(caption), most=CAPTION_BYTES + 3)
            text = decoded(said, shown(caption))
        except DataError as error:
            rejects(error)
            continue
        several += b"\n" in said.strip()
        yield Picture(label, text, _FileReader(root, name, label), _times(root, name))
    if masks:
        logger.warning("%d masks (%s) are left out: the whole of each picture is learned", masks, ", ".join(MASKS))
    if several:
        logger.warning("%d captions have several lines, which are read as one caption", several)


def _times(root: Path, name: str) -> int:
    """By kohya's folder names: the innermost that has a number, the data's own folder at last."""
    parts = [root.resolve().name, *Path(name).parts[:-1]]
    return next((number for part in reversed(parts) if (number := _repeats(part))), 1)


def _repeats(folder: str) -> int:
    """The number that kohya's folder names begin with; 0 for other names."""
    found = re.match(r"(\d{1,6})_", folder)
    return int(found[1]) if found else 0


def _from_metadata(path: Path, column: str, rejects: Rejects) -> Iterator[Picture]:
    """Rows {"file_name": ..., caption column: ...}, files relative to the table."""
    for row, where in read_records(str(path), on_bad=rejects):
        try:
            for field in ("file_name", column):
                if field not in row:
                    reason = f"no field {field!r}; it has {', '.join(map(repr, row)) or 'none'}"
                    hint = "name it with data.caption_column" if field == column else ""
                    raise DataError(reason, where=where, hint=hint)
            name = row["file_name"]
            if not isinstance(name, str) or not name:
                raise DataError("file_name is not a name", where=where)
            caption = clean(row[column], where)
        except DataError as error:
            rejects(error)
            continue
        yield Picture(shown(name), caption, _FileReader(path.parent, name, where), _times(path.parent, name))


def _from_table(table: Table, rejects: Rejects) -> Iterator[Picture]:
    for row, caption in enumerate(table.captions()):
        where = f"{shown(table.name)}:{row + 1}"
        try:
            text = clean(caption, where)
        except DataError as error:
            rejects(error)
            continue
        yield Picture(where, text, _RowReader(table, row, where))


@dataclass(frozen=True)
class _FileReader:
    root: Path
    name: str
    where: str

    def __call__(self) -> bytes:
        return read_inside(self.root, self.name, self.where)


@dataclass(frozen=True)
class _RowReader:
    table: Table
    row: int
    where: str

    def __call__(self) -> bytes:
        value = self.table.image(self.row)
        if isinstance(value, dict):
            if isinstance(value.get("bytes"), bytes):
                return bytes(value["bytes"])
            value = value.get("path")
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str):
            raise DataError("the row holds neither a picture's bytes nor a file's name", where=self.where)
        for root in self.table.roots:
            if Path(value).is_absolute() and Path(value).resolve().is_relative_to(root.resolve()):
                return read_inside(root, str(Path(value).resolve().relative_to(root.resolve())), self.where)
        return read_inside(self.table.roots[0], value, self.where)

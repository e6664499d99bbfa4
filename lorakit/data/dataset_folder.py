"""Data sets of the datasets library, kept from what it would do by itself: follow file names out of the folder, and
open or download every picture and sound that a row names.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lorakit.data.stamp import Stamp
from lorakit.errors import DataError, first_line, shown

PLAIN = frozenset({"Value", "ClassLabel", "Json", "Translation", "TranslationVariableLanguages"})
"""Kinds of columns that are what they hold; the others (Image, Audio, Video, ...) name files, which reading opens."""


Check = Callable[[], None]
"""Raises DataError when what was loaded is not what is there any more."""


def load_folder(path: Path, split: str) -> tuple[Any, Check]:
    """The data set that ``datasets.save_to_disk`` wrote to ``path``, mapped into memory, and what to call before each
    of its rows is read: a mapped file that was cut short would kill its reader. ``split`` chooses when it has several.

    Raises DataError: no such folder or split, damaged, pipes or devices in it, or links and names in its JSON that lead
    out of it.
    """
    where = shown(path)
    if (path / "dataset_dict.json").is_file():
        splits = _names(path / "dataset_dict.json", "splits")
        if split not in splits:
            raise DataError(f"no split {split!r}; it has {', '.join(splits)}", where=where)
        path = _inside(path, split, path / "dataset_dict.json")
    elif not (path / "state.json").is_file():
        kinds = (".jsonl", ".json", ".csv", ".parquet")
        inside = sorted(one for one in path.rglob("*") if one.suffix in kinds and one.is_file())
        hint = f"give each file inside it as a source of its own: {shown(inside[0])}" if inside else "give a file"
        raise DataError("this folder was not made by datasets.save_to_disk", where=where, hint=hint)
    for field in ("_data_files", "_indices_data_files"):
        for name in _names(path / "state.json", field):
            _inside(path, name, path / "state.json")
    unchanged = _unchanged(_regular_files(path))
    import datasets

    try:
        return datasets.load_from_disk(str(path)), unchanged
    except Exception as error:
        raise DataError(f"the data set cannot be read: {first_line(error)}", where=where) from error


def load_hub(path: str, split: str, revision: str | None, config: str | None = None) -> Any:
    """A data set of the hub; its code is never run, as the library has no way to. Raises DataError."""
    if Path(path).parent.name and Path(path).parent.is_dir():  # else the network would be asked for a mistyped name
        raise DataError(f"no such file or folder in {shown(Path(path).parent)}", where=shown(path))
    import datasets

    try:
        return datasets.load_dataset(path, config, split=split, revision=revision)
    except Exception as error:
        reason = f"not here, and not to be had from the hub: {' '.join(str(error).split())[:300]}"
        raise DataError(reason, where=shown(path), hint="check the name and the network") from error


def plain_rows(dataset: Any, unchanged: Check = lambda: None) -> Iterator[dict[str, Any]]:
    """A data set's rows without the columns that name files."""
    rows = iter(dataset.remove_columns([name for name, kind in dataset.features.items() if names_files(kind)]))
    while True:
        unchanged()
        try:
            row = next(rows)
        except StopIteration:
            return
        yield row


def names_files(kind: Any) -> bool:
    """Whether a column of this kind makes the library open files."""
    if isinstance(kind, dict):
        return any(names_files(inner) for inner in kind.values())
    if isinstance(kind, list | tuple):
        return any(names_files(inner) for inner in kind)
    if hasattr(kind, "feature"):
        return names_files(kind.feature)
    return type(kind).__name__ not in PLAIN


def _names(path: Path, field: str) -> list[str]:
    """The names listed under ``field`` of a JSON file, as they are or as ``filename``."""
    try:
        if path.stat().st_size > 10_000_000:
            raise ValueError("larger than 10 MB")
        listed = json.loads(path.read_bytes()).get(field) or []
        names = [entry["filename"] if isinstance(entry, dict) else entry for entry in listed]
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"{field} is not a list of names")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"the data set cannot be read: {first_line(error)}", where=shown(path)) from error
    return names


def _regular_files(folder: Path) -> list[Path]:
    """Those of a folder, in which there must be nothing else: the library opens what it finds."""
    found = sorted(folder.iterdir())
    for path in found:
        if path.is_symlink():
            raise DataError(f"outside the data set's folder: {shown(path.name)}", where=shown(path))
        if not path.is_file() and not path.is_dir():
            raise DataError("not a regular file (a pipe or a device?)", where=shown(path))
    return [path for path in found if path.is_file()]


def _unchanged(files: Sequence[Path]) -> Check:
    stamps = [(path, Stamp.of(path.stat())) for path in files]

    def check() -> None:
        for path, stamp in stamps:
            try:
                now = os.stat(path)
            except OSError as error:
                raise DataError("went away while it was read", where=shown(path)) from error
            stamp.check(now, shown(path))

    return check


def _inside(folder: Path, name: str, where: Path) -> Path:
    """``folder / name``, one step down and no link; DataError when it is not."""
    if Path(name).name != name or (folder / name).is_symlink():
        raise DataError(f"outside the data set's folder: {shown(name)}", where=shown(where))
    return folder / name

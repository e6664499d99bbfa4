"""Files to records: each a dict of fields and the place it came from, ``FILE:LINE``, for error messages.

jsonl, json, csv, parquet and txt files, folders made by ``datasets.save_to_disk``, and hub data sets. A row of a file
with lines is named by its line; a row of parquet or a data set by its number from 1. URLs, pipes and devices are
refused.
"""

import csv
import json
import os
import re
import stat
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lorakit.data.dataset_folder import load_folder, load_hub, plain_rows
from lorakit.data.stamp import Stamp
from lorakit.errors import DataError, first_line, shown

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CSV_FIELD_CHARACTERS = 16 << 20


class Record(NamedTuple):
    row: dict[str, Any]
    where: str


OnBad = Callable[[DataError], None]
"""Called for a row that cannot be read; raises it, or counts it and returns, and reading goes on."""


def fail(error: DataError) -> None:
    """The ``OnBad`` that stops at the first bad row."""
    raise error


class Rejects:
    """The ``OnBad`` of a recipe's ``on_bad``: raises the first error, or lists all and goes on."""

    def __init__(self, policy: Literal["fail", "skip"]) -> None:
        self.policy = policy
        self.errors: list[DataError] = []

    def __call__(self, error: DataError) -> None:
        if self.policy == "fail":
            raise error
        self.errors.append(error)

    def first(self) -> str:
        """The first three, for a hint."""
        return "; ".join(str(error) for error in self.errors[:3])


def read_records(
    path: str,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    *,
    on_bad: OnBad = fail,
) -> Iterator[Record]:
    """All rows of a file, a data set folder or a hub data set, in order.

    ``config``, ``split`` and ``revision`` apply to data sets that have them. Raises DataError: a file of no
    known kind, missing, not a regular file, corrupt as a whole; and whatever ``on_bad`` raises for a single row.
    """
    if "://" in path:
        raise DataError("URLs are not read", where=shown(path), hint="download the file and give its path")
    local = Path(path).expanduser()
    if os.path.isdir(local):  # Path.is_dir raises where a name is too long
        dataset, unchanged = load_folder(local, split)
        return _numbered(plain_rows(dataset, unchanged), shown(path))
    if not os.path.exists(local):
        return _hub(path, config, split, revision)
    if not stat.S_ISREG(local.stat().st_mode):
        raise DataError("not a regular file (a pipe or a device?)", where=shown(path))
    if local.suffix.lower() not in READERS:
        raise DataError(
            f"no reader for files ending in {local.suffix!r}", where=shown(path), hint=f"known: {', '.join(READERS)}"
        )
    return _steadily(local, READERS[local.suffix.lower()](local, on_bad))


def _steadily(path: Path, rows: Iterator[Record]) -> Iterator[Record]:
    """``rows``, of a file that must not change before the last one is read."""
    stamp = Stamp.of(path.stat())
    try:
        yield from rows
    except DataError:
        stamp.check(path.stat(), shown(path))
        raise
    stamp.check(path.stat(), shown(path))


def _utf8(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start}", where=where) from None


def _object(value: object, where: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"expected an object, found {type(value).__name__}", where=where)
    return Record(value, where)


def _jsonl(path: Path, on_bad: OnBad) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{shown(path)}:{number}"
            try:
                record = _object(_json_line(line, where), where)
            except DataError as error:
                on_bad(error)
            else:
                yield record


def _json_line(line: bytes, where: str) -> object:
    text = _utf8(line.removeprefix(b"\xef\xbb\xbf"), where)
    try:
        return json.loads(text)
    except RecursionError:
        raise DataError("JSON is nested too deep", where=where) from None
    except json.JSONDecodeError as error:
        if not line.endswith(b"\n") and (error.msg.startswith("Unterminated") or not text[error.pos :].strip()):
            raise DataError("the last line is truncated", where=where, hint="write the file again") from None
        hint = "a file that is one JSON list ends in .json" if text.lstrip()[:1] == "[" else ""
        raise DataError(f"bad JSON: {error.msg} at column {error.colno}", where=where, hint=hint) from None
    except ValueError:
        raise DataError("bad JSON: a number of too many digits", where=where) from None


def _json(path: Path, on_bad: OnBad) -> Iterator[Record]:
    name = shown(path)
    text = _utf8(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), name)
    line, seen = 1, 0
    try:
        for number, (value, position) in enumerate(_items(text), 1):
            breaks, seen = text.count("\n", seen, position), position
            line += breaks
            try:
                record = _object(value, f"{name}:{line}" if breaks or number == 1 else f"{name}:{line} (item {number})")
            except DataError as error:
                on_bad(error)
            else:
                yield record
    except RecursionError:
        raise DataError("JSON is nested too deep", where=name) from None
    except json.JSONDecodeError as error:
        where = f"{name}:{error.lineno}"
        if not text[error.pos :].strip():
            raise DataError("the file is truncated", where=where, hint="write the file again") from None
        hint = "a file with an object a line ends in .jsonl" if text[error.pos : error.pos + 1] == "{" else ""
        raise DataError(f"bad JSON: {error.msg} at column {error.colno}", where=where, hint=hint) from None
    except ValueError:
        raise DataError("bad JSON: a number of too many digits", where=name) from None


def _items(text: str) -> Iterator[tuple[object, int]]:
    """The items of a JSON list, or of the list under ``data`` in an object, each with its position in the text."""
    decoder, position = json.JSONDecoder(), _skip(text, 0)
    if text[position : position + 1] == "[":
        end = yield from _list_items(text, position, decoder)
        _end(text, end)
        return
    if text[position : position + 1] != "{":
        raise json.JSONDecodeError('expected a list or {"data": [...]}', text, position)
    position, found = _skip(text, position + 1), False
    while text[position : position + 1] == '"':
        key, position = decoder.raw_decode(text, position)
        position = _skip(text, _expect(text, position, ":"))
        if key == "data" and text[position : position + 1] == "[":
            found, position = True, (yield from _list_items(text, position, decoder))
        else:
            position = decoder.raw_decode(text, position)[1]
        position = _skip(text, position)
        if text[position : position + 1] != ",":
            break
        position = _skip(text, position + 1)
    _end(text, _expect(text, position, "}"))
    if not found:
        raise json.JSONDecodeError('expected a list or {"data": [...]}', text, 0)


def _list_items(text: str, start: int, decoder: json.JSONDecoder) -> Generator[tuple[object, int], None, int]:
    """Yields the items of the list at ``start`` with their positions; returns the position after the list."""
    position = _skip(text, start + 1)
    if text[position : position + 1] == "]":
        return position + 1
    while True:
        value, end = decoder.raw_decode(text, position)
        yield value, position
        position = _skip(text, end)
        if text[position : position + 1] != ",":
            return _expect(text, position, "]")
        position = _skip(text, position + 1)


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _expect(text: str, position: int, mark: str) -> int:
    """The position after ``mark``, which must come next but for blanks."""
    position = _skip(text, position)
    if text[position : position + 1] != mark:
        raise json.JSONDecodeError(f"expected {mark!r}", text, position)
    return position + 1


def _end(text: str, position: int) -> None:
    if _skip(text, position) < len(text):
        raise json.JSONDecodeError("more text after the end", text, _skip(text, position))


def _csv(path: Path, on_bad: OnBad) -> Iterator[Record]:
    name = shown(path)
    csv.field_size_limit(CSV_FIELD_CHARACTERS)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = next(rows, None)
            if not header or len(set(header)) < len(header):
                raise DataError("the first line must name the columns, each once", where=f"{name}:1")
            while True:
                where = f"{name}:{rows.line_num + 1}"
                fields = next(rows, None)
                if fields is None:
                    return
                if fields and len(fields) != len(header):
                    on_bad(DataError(f"{len(fields)} fields under {len(header)} columns", where=where))
                elif fields:
                    yield Record(dict(zip(header, fields, strict=True)), where)
        except csv.Error as error:
            raise DataError(f"bad CSV: {error}", where=f"{name}:{rows.line_num}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 after line {rows.line_num}: {error.reason}", where=name) from None


def _parquet(path: Path, _on_bad: OnBad) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    name, number = shown(path), 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(row, f"{name}:{number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"corrupt parquet after row {number}: {first_line(error)}", where=name) from None


def _txt(path: Path, _on_bad: OnBad) -> Iterator[Record]:
    """One row of plain text, its lines ended as everywhere else."""
    text = _utf8(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), shown(path))
    yield Record({"text": text.replace("\r\n", "\n")}, f"{shown(path)}:1")


READERS: dict[str, Callable[[Path, OnBad], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _txt,
}


def _hub(path: str, config: str | None, split: str, revision: str | None) -> Iterator[Record]:
    if not HUB_ID.fullmatch(path) or Path(path).suffix in READERS:
        raise DataError("no such file or folder", where=shown(path))
    return _numbered(plain_rows(load_hub(path, split, revision, config)), path)


def _numbered(rows: Iterator[dict[str, Any]], name: str) -> Iterator[Record]:
    return (Record(row, f"{name}:{number}") for number, row in enumerate(rows, 1))

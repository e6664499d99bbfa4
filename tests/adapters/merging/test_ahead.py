"""Reading ahead gives the file's own bytes, in any order, from any thread, and the right digest."""

import hashlib
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lorakit.adapters.merging.ahead import SMALL, Ahead
from lorakit.adapters.merging.source import FileSource
from lorakit.storage import bases
from lorakit.storage.bases import file_digest
from lorakit.storage.direct import Bytes, DirectReader

START = 56
SIZE = 5 * SMALL + 123


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


def in_order(steps: list[int]) -> list[tuple[int, int]]:
    """Spans one after another, of the given lengths in turn."""
    spans, place, number = [], START, 0
    while place < SIZE:
        end = min(place + steps[number % len(steps)], SIZE)
        spans.append((place, end))
        place, number = end, number + 1
    return spans


@pytest.mark.parametrize("steps", [[SMALL], [SMALL + 5], [SMALL, 10, 2000], [3 * SMALL, SMALL, 7], [SIZE]])
def test_in_order_gives_bytes_and_digest(path: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    content, file = path.read_bytes(), Ahead(path, START)
    kept = [(file.read(begin, end), content[begin:end]) for begin, end in in_order(steps)]
    assert all(found.tobytes() == expected for found, expected in kept)
    monkeypatch.setattr(bases.hashlib, "file_digest", None)  # it is not read again
    assert file_digest(path) == hashlib.sha256(content).digest()


def test_any_order_gives_bytes_and_leaves_the_digest_to_others(path: Path) -> None:
    content, file = path.read_bytes(), Ahead(path, START)
    spans = in_order([SMALL, 300])
    random.Random(0).shuffle(spans)
    for begin, end in spans * 2:
        assert file.read(begin, end).tobytes() == content[begin:end]
    assert file_digest(path) == hashlib.sha256(content).digest()


def test_several_threads_read_the_same_file(path: Path) -> None:
    content, file = path.read_bytes(), Ahead(path, START)

    def read(steps: list[int]) -> bool:
        return all(file.read(begin, end).tobytes() == content[begin:end] for begin, end in in_order(steps))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, [[SMALL], [SMALL // 2], [SMALL + 1, 9], [2 * SMALL]] * 3))
    assert file_digest(path) == hashlib.sha256(content).digest()


def test_a_file_that_has_become_shorter_gives_fewer_bytes(path: Path) -> None:
    content, file = path.read_bytes(), Ahead(path, START)
    file.read(START, START + SMALL)
    with path.open("r+b") as handle:
        handle.truncate(4 * SMALL)
    found = file.read(3 * SMALL, 5 * SMALL)
    assert found.tobytes() == content[3 * SMALL : 4 * SMALL]
    assert file_digest(path) == hashlib.sha256(content[: 4 * SMALL]).digest()


@pytest.mark.parametrize(("order", "more"), [("abc", 0), ("cab", 1), ("bca", 0), ("cba", 0)])
def test_a_tensor_read_out_of_order_is_not_read_beyond(
    tmp_path: Path, order: str, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model's layers all weights are read, but not in the order of the file: what is read twice counts. After a
    jump the file's order is believed in again as soon as the next tensor is the file's next."""
    rows, columns = 5, SMALL // 4
    tensors = {name: torch.randn(rows, columns) for name in "abc"}
    save_file(tensors, tmp_path / "x.safetensors")
    plain, read = DirectReader.read, []

    def counted(reader: DirectReader, begin: int, end: int) -> Bytes:
        read.append(end - begin)
        return plain(reader, begin, end)

    source = FileSource(tmp_path / "x.safetensors")
    monkeypatch.setattr(DirectReader, "read", counted)
    for name in order:
        for row in range(rows):
            torch.testing.assert_close(source.rows(name, row, row + 1)[0], tensors[name][row], rtol=0, atol=0)
    source._file._pool.shutdown()
    assert sum(read) == (3 * rows + more) * SMALL

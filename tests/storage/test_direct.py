"""Reading and writing past the page cache must change no byte, and no error of the disk may be lost on the way."""

import errno
import os
import resource
import subprocess
import sys
import weakref
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from lorakit.storage import direct
from lorakit.storage.direct import ALIGN, KEPT, LARGE, WRITE, Bytes, DirectReader, DirectWriter, Rooms


@pytest.fixture(params=["direct", "cache"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cache":  # as on a system without O_DIRECT
        monkeypatch.setattr(direct, "_DIRECT", 0)
    return str(request.param)


def content(size: int) -> Bytes:
    return np.random.default_rng(0).integers(0, 256, size, np.uint8)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_any_bytes_are_read(tmp_path: Path, fresh: bool, cached: bool) -> None:
    path, whole = tmp_path / "file", content(3 * ALIGN + 77)
    path.write_bytes(whole.tobytes())
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if not cached and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with closing(DirectReader(path, fresh=fresh)) as reader:
        assert reader.size == len(whole)
        for begin in (0, 1, ALIGN - 1, ALIGN, 2 * ALIGN + 5):
            for end in (begin, begin + 1, begin + ALIGN, len(whole)):
                assert np.array_equal(reader.read(begin, end), whole[begin:end])
        os.truncate(path, ALIGN + 10)
        assert np.array_equal(reader.read(5, 2 * ALIGN), whole[5 : ALIGN + 10])
        assert len(reader.read(2 * ALIGN, 3 * ALIGN)) == 0


@pytest.mark.skipif(not direct._DIRECT, reason="no transfers past the page cache here")
def test_it_takes_what_the_page_cache_has_and_brings_nothing_in(tmp_path: Path) -> None:
    path, size = tmp_path / "file", 64 * ALIGN
    path.write_bytes(content(size).tobytes())
    with closing(DirectReader(path)) as reader:
        assert reader._cache is not None
        if reader._direct is None or not reader._cache.has(0, size):
            pytest.skip("no such transfers, or no such cache, in this folder")
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        reader.read(0, 2 * ALIGN)
        reader.read(2 * ALIGN, 3 * ALIGN)
        assert not any(reader._cache.has(at, at + 1) for at in range(0, size, ALIGN))
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            file.seek(7 * ALIGN)
            file.read(1)
        assert reader._cache.has(7 * ALIGN, 8 * ALIGN)
        assert not reader._cache.has(6 * ALIGN, 8 * ALIGN)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    "sizes",
    [[0], [1], [ALIGN], [ALIGN, LARGE, 8, LARGE, 2 * ALIGN, LARGE], [WRITE - 1, 2, WRITE * 2 + 3], [8192, 100, LARGE]],
)
def test_what_is_written_is_in_the_file(tmp_path: Path, sizes: list[int]) -> None:
    pieces = [Rooms().take(size) for size in sizes]
    for piece in pieces:
        piece[:] = content(len(piece))
    with closing(DirectWriter(tmp_path / "file")) as writer:
        for piece in pieces:
            writer.write(piece)
        writer.finish()
    assert (tmp_path / "file").read_bytes() == b"".join(piece.tobytes() for piece in pieces)


@pytest.mark.parametrize("limit", [WRITE, WRITE + 1000, 2 * WRITE - ALIGN, 2 * WRITE - 1])
def test_a_file_that_may_not_grow_says_so(tmp_path: Path, limit: int) -> None:
    """A limit amid a direct transfer's block too."""
    program = f"""
import numpy, resource, signal
from pathlib import Path
from lorakit.storage.direct import DirectWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {resource.RLIM_INFINITY}))
writer = DirectWriter(Path("file"))
try:
    writer.write(numpy.ones({2 * WRITE}, numpy.uint8))
except OSError as error:
    print(error.errno)
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [str(errno.EFBIG)]
    assert (tmp_path / "file").stat().st_size == limit


def test_memory_is_taken_again_when_nobody_sees_it() -> None:
    rooms = Rooms()
    first = rooms.take(ALIGN)
    address = first.ctypes.data
    assert address % ALIGN == 0
    seen = torch.from_numpy(first[8:16]).view(torch.int32)[1:]
    del first
    others = [rooms.take(ALIGN) for _ in range(KEPT - 1)]
    assert address not in [other.ctypes.data for other in others]
    del seen
    assert rooms.take(ALIGN).ctypes.data == address


def test_memory_is_given_back() -> None:
    rooms = Rooms()
    owners = [weakref.ref(room.base) for room in (rooms.take(ALIGN), rooms.take(WRITE))]
    seen = rooms.take(LARGE)
    seen[:] = 7
    rooms.release()
    assert [owner() for owner in owners] == [None, None]
    assert (seen == 7).all()


def test_much_memory_is_not_kept() -> None:
    rooms = Rooms()
    owner = weakref.ref(rooms.take(2 * WRITE).base)
    assert owner() is None

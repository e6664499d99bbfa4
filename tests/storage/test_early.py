"""What the page cache is told early must change no byte, and no error of the disk may be lost on the way."""

import os
import sys
from pathlib import Path

import pytest

from lorakit.storage.early import LAG, STEP, Early, drop, open_in_order


def test_a_file_sent_early_is_whole(tmp_path: Path) -> None:
    block, path = bytes(range(256)) * 4096, tmp_path / "file"
    count = (LAG + 3) * STEP // len(block) + 1
    with path.open("wb", buffering=0) as file:
        early = Early(file.fileno())
        for _ in range(count):
            file.write(block)
            early.wrote(file.tell())
        file.write(b"end")
        early.wrote(file.tell())
    handle = open_in_order(path)
    try:
        for number in range(count):
            assert os.read(handle, len(block)) == block
            drop(handle, number * len(block) + 1)
        assert os.read(handle, 4) == b"end"
    finally:
        os.close(handle)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is sent early")
def test_an_error_is_raised() -> None:
    reading, writing = os.pipe()
    try:
        Early(writing).wrote(STEP - 1)
        with pytest.raises(OSError, match="Illegal seek"):
            Early(writing).wrote(STEP)
    finally:
        os.close(reading)
        os.close(writing)

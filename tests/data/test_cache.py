"""The content-addressed tensor cache: keys, exactness, damage, a full or read-only disk."""

import logging
import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorakit.data.cache import TensorCache, content_key, default_folder, remembered
from lorakit.errors import DataError, ResourceError

KEY = content_key(b"picture", "transform", 512)


def entry() -> dict[str, torch.Tensor]:
    return {"mean": torch.randn(4, 8, 8), "deviation": torch.rand(4, 8, 8).to(torch.bfloat16)}


def test_round_trip_is_exact_and_plain_safetensors(tmp_path: Path) -> None:
    cache, tensors = TensorCache(tmp_path), entry()
    assert not cache.holds(KEY)
    cache.write(KEY, tensors)
    assert cache.holds(KEY)
    for read in (cache.read(KEY), load_file(cache.path(KEY))):
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[k], tensors[k]) and read[k].dtype == tensors[k].dtype for k in tensors)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [f"{KEY}.safetensors"]


def test_keys_tell_parts_apart() -> None:
    keys = {
        content_key("ab", "c"),
        content_key("a", "bc"),
        content_key("abc"),
        content_key(b"ab", "c"),
        content_key("1"),
        content_key(1),
        content_key(1.0),
        content_key(),
    }
    assert len(keys) == 8
    assert content_key("ab", 1) == content_key("ab", 1)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "header"])
def test_a_damaged_entry_is_found_removed_and_told(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TensorCache(tmp_path)
    cache.write(KEY, entry())
    path = cache.path(KEY)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
    elif damage == "header":
        data[:8] = (2**63).to_bytes(8, "little")
    path.write_bytes({"cut": data[:-7], "empty": b""}.get(damage, bytes(data)))
    with caplog.at_level(logging.WARNING, "lorakit"):
        assert not cache.holds(KEY)
    assert "made anew" in caplog.text
    assert not path.exists()
    cache.write(KEY, entry())
    assert cache.holds(KEY)


def test_an_entry_that_vanished_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vanished"):
        TensorCache(tmp_path).read(KEY)


def test_a_folder_that_cannot_be_made_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="cache cannot be written"):
        TensorCache(tmp_path / "file").write(KEY, entry())


def _write_often(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tensors = entry()
    for _ in range(50):
        TensorCache(folder).write(KEY, tensors)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # beside threads, which the writers do not use
def test_writers_at_the_same_time_leave_one_whole_entry(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # which saves torch's import
    writers = [context.Process(target=_write_often, args=(tmp_path,), daemon=True) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [w.exitcode for w in writers] == [0, 0]
    assert TensorCache(tmp_path).holds(KEY)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [f"{KEY}.safetensors"]


def test_the_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.delenv("LORAKIT_CACHE")
    assert default_folder() == Path.home() / ".cache" / "lorakit"


def test_a_value_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    made = []

    def make() -> dict[str, object]:
        made.append(1)
        return {"sizes": (3, 4), "name": "é"}

    found = [remembered("facts", key, make) for key in (KEY, KEY, content_key("other"))]
    assert found == [{"sizes": [3, 4], "name": "é"}] * 3  # as JSON has it, the first time too
    assert len(made) == 2
    path = TensorCache(tmp_path / "facts").path(KEY)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert remembered("facts", KEY, make) == found[0]
    assert len(made) == 3


def test_a_value_that_cannot_be_kept_is_made_each_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "file"))
    assert [remembered("facts", KEY, lambda: 1) for _ in range(2)] == [1, 1]
    assert caplog.text.count("the cache cannot be written") == 2


def test_an_entry_that_cannot_be_read_or_removed_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = TensorCache(tmp_path)
    (cache.path("ab") / "inside").mkdir(parents=True)
    assert not cache.holds("ab")
    assert "the cache entry cannot be read and is made anew: [Errno 21] Is a directory" in caplog.text
    assert (cache.path("ab") / "inside").is_dir()

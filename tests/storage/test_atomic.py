import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.errors import CheckpointError, ConflictError, ResourceError
from lorakit.storage import atomic, disk, manifest


def make(final: Path, **options: bool) -> None:
    with atomic.new_folder(final, manifest=True, **options) as folder:
        (folder / "a.bin").write_bytes(b"a" * 1000)
        (folder / "deep").mkdir()
        (folder / "deep" / "b.txt").write_text("b")


def replace(path: Path, old: bytes, new: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(old, new))


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the disk, in order; what is written aside is called by its place and ``~``."""
    told: list[str] = []

    def name(path: object) -> str:
        return re.sub(r"\.tmp-([^-/]+)-\w+", r"\1~", os.path.relpath(str(path), tmp_path))

    def of(handle: int) -> Path:
        opened = os.fstat(handle)
        (path,) = [p for p in (tmp_path, *tmp_path.rglob("*")) if os.path.samestat(opened, p.lstat())]
        assert path.is_dir() or opened.st_size, "flushed before it is written"
        return path

    def watch(owner: object, call: str, told_as: Callable[..., str]) -> None:
        real = getattr(owner, call)
        monkeypatch.setattr(owner, call, lambda *args: (told.append(told_as(*args)), real(*args))[1])

    watch(os, "fsync", lambda handle: f"fsync {name(of(handle))}")
    watch(os, "mkdir", lambda path, *_: f"mkdir {name(path)}")
    for call in ("rename", "replace"):
        watch(os, call, lambda old, new: f"rename {name(old)} {name(new)}")
    watch(atomic, "_exchange", lambda one, other: f"exchange {name(one)} {name(other)}")
    return told


def test_bytes_are_on_the_disk_before_they_have_their_name(tmp_path: Path, asked: list[str]) -> None:
    atomic.write_bytes(tmp_path / "x", b"content")
    assert asked == ["fsync x~", "rename x~ x", "fsync ."]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, asked: list[str]) -> None:
    with atomic.new_file(tmp_path / "new" / "x") as path:
        path.write_bytes(b"content")
    assert asked == ["mkdir new", "fsync .", "fsync new/x~", "rename new/x~ new/x", "fsync new"]


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, asked: list[str]) -> None:
    make(tmp_path / "new" / "x")
    made = ["mkdir new/x~", "mkdir new/x~/deep"]
    files = ["fsync new/x~/a.bin", "fsync new/x~/deep/b.txt", "fsync new/x~/manifest.json"]
    flushed = [*made, *files, "fsync new/x~/deep", "fsync new/x~"]
    assert asked == ["mkdir new", "fsync .", *flushed, "rename new/x~ new/x", "fsync new"]
    asked.clear()
    make(tmp_path / "new" / "x", replace=True)
    assert asked == [*flushed, "exchange new/x~ new/x", "fsync new"]


def test_without_exchange_the_new_folder_is_on_the_disk_before_the_old_one_is_removed(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "x")
    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    monkeypatch.setattr(atomic, "_remove", lambda path: asked.append(f"remove {path.name}"))
    asked.clear()
    make(tmp_path / "x", replace=True)
    calls = [re.sub(r"\.old-x-\w+", "old", call) for call in asked]
    order = ["mkdir old", "rename x old/x", "rename x~ x", "fsync .", "remove x"]
    assert [call for call in calls if call in order][:5] == order


def test_made_folders_are_on_the_disk_before_what_is_in_them(tmp_path: Path, asked: list[str]) -> None:
    disk.make_folder(tmp_path / "a" / "b")
    assert asked == ["mkdir a", "fsync .", "mkdir a/b", "fsync a"]


def test_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    atomic.write_text(path, "one")
    atomic.write_text(path, "zwei ü")
    assert path.read_bytes() == "zwei ü".encode()
    assert os.listdir(tmp_path) == ["x.txt"]
    assert manifest.sha256(path) == hashlib.sha256("zwei ü".encode()).hexdigest()


def test_write_replaces_a_link_not_its_target(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("keep")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    atomic.write_text(tmp_path / "link", "new")
    assert (tmp_path / "target").read_text() == "keep"
    assert not (tmp_path / "link").is_symlink()


def test_folder_appears_complete_with_its_manifest(tmp_path: Path) -> None:
    final = tmp_path / "out" / "step"
    make(final)
    files = json.loads((final / "manifest.json").read_text())["files"]
    assert files.keys() == {"a.bin", "deep/b.txt"}
    assert files["a.bin"] == {"sha256": hashlib.sha256(b"a" * 1000).hexdigest(), "size": 1000}
    manifest.check_manifest(final)
    assert os.listdir(tmp_path / "out") == ["step"]


def test_a_folder_behind_a_link_takes_new_ones(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to("disk")
    make(tmp_path / "runs" / "out")
    make(tmp_path / "runs" / "deep" / "er" / "out")
    manifest.check_manifest(tmp_path / "disk" / "deep" / "er" / "out")


def test_an_error_leaves_no_folder(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic.new_folder(tmp_path / "out", manifest=False) as folder:
            (folder / "half").write_text("x")
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    assert os.listdir(tmp_path) == []


def test_existing_folder_is_kept_unless_replaced(tmp_path: Path) -> None:
    make(tmp_path / "out")
    with pytest.raises(ConflictError, match="exists"):
        make(tmp_path / "out")
    with pytest.raises(KeyError), atomic.new_folder(tmp_path / "out", manifest=False, replace=True):
        raise KeyError("stop")
    manifest.check_manifest(tmp_path / "out")
    with atomic.new_folder(tmp_path / "out", manifest=False, replace=True) as folder:
        (folder / "c").write_text("c")
    assert os.listdir(tmp_path / "out") == ["c"]
    assert os.listdir(tmp_path) == ["out"]


def test_replacing_is_one_step_where_the_system_can_and_works_elsewhere_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "out")
    seen: list[bool] = []
    exchange = atomic._exchange

    def watched(new: Path, old: Path) -> bool:
        done = exchange(new, old)
        seen.append(done and (old / "new").exists() and (new / "a.bin").exists())
        return done

    for able in (watched, lambda *_: False):
        monkeypatch.setattr(atomic, "_exchange", able)
        with atomic.new_folder(tmp_path / "out", manifest=False, replace=True) as folder:
            (folder / "new").write_text("n")
        assert os.listdir(tmp_path / "out") == ["new"]
        assert os.listdir(tmp_path) == ["out"]
    assert seen == [True] or sys.platform != "linux"


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lambda f: (f / "a.bin").write_bytes(b"a" * 999 + b"b"), "a.bin"),
        (lambda f: (f / "a.bin").write_bytes(b"a" * 999), "a.bin"),
        (lambda f: (f / "deep" / "b.txt").unlink(), "deep/b.txt"),
        (lambda f: (f / "extra").write_text(""), "extra"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json"),
        (lambda f: (f / "manifest.json").write_text('{"files": []}'), "manifest.json"),
        (lambda f: replace(f / "manifest.json", b'"version": 1', b'"version": 3'), "manifest.json"),
        (lambda f: replace(f / "manifest.json", b"\n", b"\r"), "manifest.json"),
    ],
)
def test_manifest_names_the_bad_file(tmp_path: Path, harm, named: str) -> None:
    make(tmp_path / "out")
    harm(tmp_path / "out")
    with pytest.raises(CheckpointError) as caught:
        manifest.check_manifest(tmp_path / "out")
    assert caught.value.where == str(tmp_path / "out" / named)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"a" * 1000)
    make(tmp_path / "out")
    (tmp_path / "out" / "a.bin").unlink()
    (tmp_path / "out" / "a.bin").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match=r"a\.bin"):
        manifest.check_manifest(tmp_path / "out")
    with pytest.raises(ConflictError), atomic.new_folder(tmp_path / "linked", manifest=False) as folder:
        (folder / "link").symlink_to(tmp_path)
    assert (tmp_path / "outside").exists()
    assert not (tmp_path / "linked").exists()


def test_sweep_removes_only_leftovers(tmp_path: Path) -> None:
    (tmp_path / ".tmp-a").mkdir()
    (tmp_path / ".tmp-a" / "x").write_text("x")
    (tmp_path / ".tmp-b").write_text("b")
    (tmp_path / "keep").mkdir()
    (tmp_path / ".tmp-link").symlink_to(tmp_path / "keep")
    atomic.sweep(tmp_path)
    atomic.sweep(tmp_path / "absent")
    assert os.listdir(tmp_path) == ["keep"]


def test_whoever_writes_sweeps_what_a_killed_process_left_there(tmp_path: Path) -> None:
    for name in ("folder", "file.txt", "bytes"):
        (tmp_path / f".tmp-{name}-x").write_text("x")
    with atomic.new_folder(tmp_path / "folder", manifest=False):
        pass
    with atomic.new_file(tmp_path / "file.txt") as path:
        atomic.write_text(path, "content")
        assert len(list(tmp_path.glob(".tmp-file*"))) == 1
    atomic.write_bytes(tmp_path / "bytes", b"content")
    assert sorted(os.listdir(tmp_path)) == ["bytes", "file.txt", "folder"]
    assert (tmp_path / "file.txt").read_text() == "content"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.EACCES])
@pytest.mark.fault(58)
def test_disk_errors_become_resource_errors(tmp_path: Path, number: int) -> None:
    with pytest.raises(ResourceError, match="cannot write"), atomic.new_folder(tmp_path / "a", manifest=False):
        raise OSError(number, "disk")
    with pytest.raises(ResourceError), disk.disk_errors(tmp_path):
        raise RuntimeError(f"I/O error: something (os error {number})")
    with pytest.raises(FileNotFoundError), disk.disk_errors(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "no")
    assert os.listdir(tmp_path) == []


@pytest.mark.fault(46)
def test_a_file_over_the_limit_is_a_resource_error_and_leaves_the_old_one(tmp_path: Path) -> None:
    """A real EFBIG: the kernel refuses files over RLIMIT_FSIZE."""
    (tmp_path / "x").write_text("old")
    program = (
        "import resource, signal, sys; from pathlib import Path; from lorakit.storage import atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: atomic.write_bytes(Path(sys.argv[1]), bytes(5000))\n"
        "except Exception as e: print(type(e).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "x"], capture_output=True, text=True, check=True)
    assert done.stdout == "ResourceError\n"
    assert (tmp_path / "x").read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_of_two_who_write_one_folder_the_later_is_told(tmp_path: Path) -> None:
    final = tmp_path / "final"

    def both() -> None:
        with atomic.new_folder(final, manifest=False) as later:
            (later / "a").write_text("later")
            with atomic.new_folder(final, manifest=False) as first:
                (first / "a").write_text("first")

    with pytest.raises(ConflictError, match="exists already"):
        both()
    assert (final / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    code = (
        "import sys; from pathlib import Path; from lorakit.storage import atomic\n"
        "with atomic.alone(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        entered = threading.Event()

        def enter() -> None:
            with atomic.alone(folder):
                entered.set()

        waiting = threading.Thread(target=enter)
        waiting.start()
        assert not entered.wait(0.3)
        other.communicate()
        waiting.join(20)
        assert entered.is_set()


@pytest.mark.parametrize("name", ["n" * 250 + ".txt", "雪" * 83 + ".txt"])
def test_names_as_long_as_a_file_system_has_them(tmp_path: Path, name: str) -> None:
    atomic.write_text(tmp_path / name, "one")
    with atomic.new_file(tmp_path / name, replace=True) as path:
        path.write_text("two")
    assert (tmp_path / name).read_text() == "two"
    with atomic.new_folder(tmp_path / "f" / name, manifest=True) as folder:
        (folder / "a").write_text("b")
    atomic.discard(tmp_path / "f" / name)
    assert [path.name for path in tmp_path.iterdir()] in ([name, "f"], ["f", name])
    assert not list((tmp_path / "f").iterdir())


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(ConflictError, match="a file, where a folder is needed"):
        disk.make_folder(tmp_path / "a" / "b")

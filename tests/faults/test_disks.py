"""Disks that lack what Linux's own file systems have: networks', foreign ones, overlays. The kernel really refuses."""

import errno
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorakit.errors import ResourceError
from lorakit.storage import atomic, manifest
from tests.faults.harness import files, forked, process
from tests.tiny import tiny_llama
from tests.torture import trace
from tests.torture.refuse import BARE, refuse

pytestmark = pytest.mark.skipif(not trace.supported(), reason="the filter is for Linux on x86-64")


def test_a_language_model_on_a_bare_disk(llama: Path) -> None:
    """No locks, modes, exchange, flushed folders, shared maps, nor a word of what is free."""
    recipe, run = llama / "recipe.yaml", llama / "runs/chats"
    every = ("--set", "train.checkpoint_every=1", "--set", "train.keep_checkpoints=1")
    trained = forked("train-llama", recipe, *every, refused=BARE)
    assert (trained.code, "has no locks" in " ".join(trained.err.split())) == (0, True), trained.err
    (kept,) = (run / "checkpoints").iterdir()
    assert {oct(path.stat().st_mode & 0o777) for path in kept.iterdir()} == {"0o644"}
    assert "had finished already" in forked("train-llama", recipe, *every, "--resume", refused=BARE).out
    merge = ("merge", llama / "base", run, llama / "merged")
    assert "what is free is not known" in forked(*merge, "--dry-run", refused=BARE).out
    for more in ((), ("--overwrite",)):
        done = forked(*merge, *more, refused=BARE)
        assert done.code == 0, done.err
    assert not list(llama.glob(".*"))
    gguf = forked("convert", run, llama / "a.gguf", "--to", "gguf", "--base", llama / "base", refused=BARE)
    assert gguf.code == 0, gguf.err
    answer = ("generate", "--base", llama / "base", "--adapter", llama / "a.gguf", "--prompt", "a")
    done = forked(*answer, "--max-new-tokens", "2", "--out", llama / "b", refused=BARE)
    assert done.code == 0, done.err


def test_a_stable_diffusion_on_a_bare_disk(sd: Path) -> None:
    trained = forked("train-sd", sd / "recipe.yaml", refused=BARE)
    assert trained.code == 0, trained.err
    drawing = ("generate", "--base", sd / "base", "--adapter", sd / "runs/colours", "--prompt", "a", "--steps", "1")
    done = forked(*drawing, "--width", "32", "--height", "32", "--out", sd / "drawn", refused=BARE)
    assert done.code == 0, done.err


def test_a_checkpoint_that_somebody_reads_does_not_end_the_run(llama: Path) -> None:
    """NFS and FUSE keep an open file under another name, so that its folder cannot be removed."""
    every = ("--set", "train.checkpoint_every=1", "--set", "train.keep_checkpoints=1", "--set", "sample.prompts=[a]")
    done = forked("train-llama", llama / "recipe.yaml", *every, refused={"remove a folder": errno.ENOTEMPTY})
    assert done.code == 0, done.err
    assert [path.name for path in (llama / "runs/chats/checkpoints").glob("step-*")] == ["step-000002"]
    (llama / "runs/chats/adapter/adapter_model.safetensors").stat()


def test_a_folder_whose_successor_cannot_take_its_place_stays(llama: Path) -> None:
    """Where two folders cannot change places, the old one has another name for a moment."""
    assert forked("train-llama", llama / "recipe.yaml").code == 0
    merge = ("merge", llama / "base", llama / "runs/chats", llama / "merged")
    assert forked(*merge).code == 0
    before = files(llama)
    forked(*merge, "--overwrite", refused={"exchange": errno.EINVAL, "rename": errno.EIO}).refused(6, "Input/output")
    assert files(llama) == before


def test_what_a_killed_process_put_aside_comes_back(tmp_path: Path) -> None:
    for name in ("model", "model-b"):
        (tmp_path / f".old-{name}-x" / name).mkdir(parents=True)
    (tmp_path / "model-b").mkdir()
    atomic.sweep_killed(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".old-model-b-x", "model", "model-b"]
    atomic.sweep_killed(tmp_path / "model-b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model-b"]


def test_what_cannot_be_read_just_now_is_not_taken_for_damaged(tmp_path: Path) -> None:
    """A server that is away must not cost the newest checkpoint."""
    with atomic.new_folder(tmp_path / "a", manifest=True) as folder:
        (folder / "weights").write_bytes(b"1")

    def look() -> None:
        refuse({"open what is no link": errno.ESTALE})  # in this thread alone
        manifest.check_manifest(tmp_path / "a")

    with ThreadPoolExecutor(1) as pool, pytest.raises(ResourceError, match=r"weights: cannot be read: Stale"):
        pool.submit(look).result()
    manifest.check_manifest(tmp_path / "a")


def test_what_programs_leave_in_folders_is_no_damage_and_no_model(llama: Path) -> None:
    every = ("train-llama", llama / "recipe.yaml", "--set", "train.checkpoint_every=1")
    for name in ("._config.json", "._model-00001-of-00004.safetensors", ".DS_Store"):
        (llama / "base" / name).write_bytes(b"\0\5\x16\7Mac OS X")
    assert forked(*every).code == 0
    for folder in (llama / "runs/chats/checkpoints").iterdir():
        for name in (".DS_Store", "._state.json", "Thumbs.db", "@eaDir"):
            (folder / name).touch()
    done = forked(*every, "--resume")
    assert (done.code, "intact" in done.err) == (0, False), done.err
    (llama / "runs/chats/checkpoints/step-000002/more.bin").touch()
    assert "is not in the manifest" in " ".join(forked(*every, "--resume").err.split())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_base_under_another_name_is_the_base(llama: Path) -> None:
    """A bind mount here; on exFAT, NTFS and macOS's disks upper and lower case do the same."""
    assert forked("train-llama", llama / "recipe.yaml").code == 0
    other = llama / "other"
    other.mkdir()
    if subprocess.run(["mount", "--bind", llama, other], check=False).returncode:
        pytest.skip("this system mounts nothing here")
    try:
        before = files(llama / "base")
        merge = ("merge", llama / "base", llama / "runs/chats", other / "base", "--overwrite")
        forked(*merge).refused(7, "OUT is the base")
        inside = ("train-llama", llama / "recipe.yaml", "--set", f"output.folder={other}/base/runs")
        forked(*inside).refused(2, "would be inside base.model")
        assert files(llama / "base") == before
    finally:
        subprocess.run(["umount", other], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_merge_onto_a_disk_that_is_read_only_says_so(llama: Path) -> None:
    assert forked("train-llama", llama / "recipe.yaml").code == 0
    place = llama / "read-only"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", place], check=False).returncode:
        pytest.skip("this system mounts nothing here")
    try:
        merge = ("merge", llama / "base", llama / "runs/chats", place / "merged", "--dry-run")
        forked(*merge).refused(6, f"{place}: cannot be written")
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_what_an_overlay_has_below_is_replaced(tmp_path: Path) -> None:
    """A run or a model that came with a container's image: its folders cannot be renamed."""
    lower, upper, work, seen = (tmp_path / name for name in ("lower", "upper", "work", "seen"))
    for folder in (lower / "old", upper, work, seen):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    mounted = subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", seen], check=False)
    if mounted.returncode:
        pytest.skip("this system mounts no overlay here")
    try:
        with atomic.new_folder(seen / "old", manifest=False, replace=True) as folder:
            (folder / "new").touch()
        assert [path.name for path in (seen / "old").iterdir()] == ["new"]
        (seen / "old" / "new").unlink()
    finally:
        subprocess.run(["umount", seen], check=True)


@pytest.mark.fault(61)
def test_61_a_disk_that_is_too_small_is_seen_first(llama: Path) -> None:
    assert forked("train-llama", llama / "recipe.yaml").code == 0
    small = llama / "small"
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", small], check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        forked("merge", llama / "base", llama / "runs/chats", small / "out").refused(6, str(small), "are free")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_where_nothing_can_be_made(llama: Path, tmp_path: Path) -> None:
    """A name that no file system takes, for itself or for what is written beside it, and the kernel's own folder."""
    run, out = llama / "runs/chats", tmp_path / ("x" * 300)
    assert forked("train-llama", llama / "recipe.yaml").code == 0
    merge, small = ("merge", llama / "base", run), ("resize", run)
    for words in ((*merge, out), (*merge, out, "--dry-run"), (*small, out, "--rank", "1")):
        forked(*words).refused(6, "cannot write: File name too long")
    proc = "/proc/merged"
    for words in ((*merge, proc), (*merge, proc, "--dry-run"), (*small, proc, "--rank", "1")):
        forked(*words).refused(6, "/proc: takes no new files")
    (tmp_path / "file").touch()
    for more in ((), ("--dry-run",)):
        forked(*merge, tmp_path / "file" / "merged", *more).refused(7, "file: a file, where a folder is needed")


def test_a_model_in_more_files_than_may_be_open(llama: Path) -> None:
    """As few as the shell allows are no end where the system allows more."""
    assert forked("train-llama", llama / "recipe.yaml").code == 0
    tiny_llama(llama / "base", max_shard_size="1KB")
    assert len(list((llama / "base").glob("*.safetensors"))) > 15
    merge = ("merge", llama / "base", llama / "runs/chats")
    limited = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (50, {}))"
    process(*merge, llama / "one", prelude=limited.format(50)).refused(6, "Too many open files")
    assert process(*merge, llama / "other", prelude=limited.format(4096)).code == 0

"""Checkpoints that are damaged, disks that are full or closed, two runs in one folder: the real thing each time."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorakit.storage import manifest
from tests.torture import check, flips, trace
from tests.torture.cases import STOPS
from tests.torture.killing import Bench


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stop(bench: Bench, name: str, micro_batch: int = 9) -> Path:
    """A run stopped by SIGTERM after its fifth update, with the checkpoints of steps 4 and 5."""
    cwd = bench.fresh(name)
    done = bench.start(cwd, {"signal_at": (micro_batch, "SIGTERM")})
    assert done.code == 75, done.err
    return cwd


def goes_on(bench: Bench, cwd: Path) -> None:
    done = bench.start(cwd)
    assert done.code == 0, done.err
    assert check.divergent(cwd / "runs/run", bench.reference) == []


@pytest.mark.fault(47)
def test_flipped_bits_are_found(llama: Bench) -> None:
    cwd = stop(llama, "flips")
    tried, missed = flips.try_all(cwd / "runs/run", seed=0, count=500, stride=17)
    assert missed == []
    assert tried > 200


def test_without_the_manifests_check_flips_are_missed(llama: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    cwd = stop(llama, "flips-missed")
    monkeypatch.setattr(manifest, "check_manifest", lambda _: None)
    tried, missed = flips.try_all(cwd / "runs/run", seed=0, count=500, stride=97)
    assert len(missed) > tried / 4


@pytest.mark.fault(47)
def test_a_flip_makes_the_run_go_on_from_the_checkpoint_before_or_not_at_all(llama: Bench) -> None:
    cwd = stop(llama, "flip")
    saved = cwd / "runs/run/checkpoints"
    flips.flip(saved / "step-000005/optimizer.safetensors", 4321, 3)
    other = shutil.copytree(cwd, llama.fresh("flip-both"), dirs_exist_ok=True)
    done = llama.start(cwd)
    assert done.code == 0
    assert "step-000005/optimizer.safetensors: the file differs from its manifest; using the checkpoint" in done.err
    assert check.divergent(cwd / "runs/run", llama.reference) == []

    flips.flip(other / "runs/run/checkpoints/step-000004/state.json", 5, 0)
    before = contents(other / "runs")
    done = llama.start(other)
    assert done.code == 9, done.err
    assert "no checkpoint is intact" in done.err
    assert contents(other / "runs") == before


@pytest.mark.fault(57)
def test_checkpoints_without_the_step_that_all_random_numbers_follow_from(llama: Bench) -> None:
    cwd = stop(llama, "stepless")
    for path in cwd.glob("runs/run/checkpoints/*/state.json"):
        path.unlink()
    done = llama.start(cwd)
    assert done.code == 9, done.err
    assert "state.json: a file is missing; using the checkpoint before it" in done.err


@pytest.mark.fault(46)
def test_a_file_over_the_limit_leaves_the_old_checkpoints(llama: Bench) -> None:
    """The kernel's own refusal in the middle of a save."""
    cwd = stop(llama, "limit")
    before = contents(cwd / "runs/run/checkpoints")
    done = llama.start(cwd, {"file_limit": 15_000})
    assert done.code == 6, done.err
    assert "File too large" in done.err
    assert len(done.err.split("lorakit: error:")) == 2
    assert contents(cwd / "runs/run/checkpoints") == before
    assert not list(cwd.rglob(".tmp-*"))
    goes_on(llama, cwd)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte, where this user may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(["mount", *options], capture_output=True, check=False).returncode != 0:
        pytest.skip("no right to mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.fault(46)
def test_a_full_disk_leaves_the_old_checkpoints(llama: Bench, small_disk: Path) -> None:
    cwd = shutil.copytree(stop(llama, "full"), small_disk / "work")
    before = contents(cwd / "runs/run/checkpoints")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 40_000))
    done = llama.start(cwd)
    assert done.code == 6, done.err
    assert "No space left on device" in done.err
    assert contents(cwd / "runs/run/checkpoints") == before
    filler.unlink()
    goes_on(llama, cwd)


def test_the_doctor_tells_of_a_small_disk(llama: Bench, small_disk: Path) -> None:
    done = llama.runner.run(["doctor"], small_disk)
    assert done.code == 0, done.err
    assert "little: checkpoints and merged models may not fit" in " ".join(done.err.split())


@pytest.mark.fault(58)
def test_a_folder_that_cannot_be_written(llama: Bench, small_disk: Path) -> None:
    cwd = shutil.copytree(stop(llama, "closed"), small_disk / "work")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    before = contents(cwd)
    for words in ([], ["--resume"], ["--set", "output.name=other"]):
        done = llama.runner.run([*llama.command, *words], cwd)
        assert done.code == 6, done.err
        assert "Read-only file system" in done.err
        assert "Traceback" not in done.err
    assert contents(cwd) == before
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    goes_on(llama, cwd)


@pytest.mark.fault(53)
def test_a_second_run_is_told_who_has_the_folder_and_a_dead_ones_lock_is_taken(llama: Bench) -> None:
    cwd = llama.fresh("two")
    first = llama.runner.start([*llama.command, "--set", "train.steps=100000"], cwd)
    try:
        lock = cwd / "runs/run/.lock"
        end = time.monotonic() + 60
        while not (lock.exists() and lock.read_text().strip()) and time.monotonic() < end:
            time.sleep(0.02)
        for words in ([], ["--resume"]):
            second = llama.runner.run([*llama.command, *words], cwd)
            assert second.code == 7, second.err
            assert f"another run (process {first.pid} on " in second.err
    finally:  # it would train on when the test fails
        first.kill(9)
    assert first.wait().code == -9
    assert lock.exists()
    shutil.rmtree(cwd / "runs/run/checkpoints", ignore_errors=True)
    goes_on(llama, cwd)


@pytest.mark.skipif(not trace.supported(), reason="no tracing here: it takes Linux on x86-64")
@pytest.mark.fault(45)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_sigterm_in_the_middle_of_a_save_lets_it_complete(llama: Bench, share: float) -> None:
    """At its first operation, its last one and two between."""
    cwd = llama.fresh(f"term-saving-{share}")
    paths = [path for _, path, _ in llama.operations()]
    later = next(n for n, path in enumerate(paths) if "checkpoints" in path and "step-000004" in path)
    saving = [n for n, path in enumerate(paths[:later]) if "step-000002" in path]
    number = saving[round(share * (len(saving) - 1))]
    request = {"root": str(cwd / "runs"), "kill_at": number, "number": signal.SIGTERM}
    done = llama.start(cwd, {"trace": request})
    assert done.code == 75, done.err
    assert check.broken(cwd / "runs/run", llama.reference) == []
    assert check.steps(cwd / "runs/run") == [2, 3]
    goes_on(llama, cwd)


@pytest.mark.fault(44)
def test_a_second_signal_ends_at_once(llama: Bench) -> None:
    cwd = llama.fresh("twice")
    done = llama.start(cwd, {"signal_at": (STOPS["in mid-epoch"][0], "SIGINT"), "signals": 2})
    assert done.code == 130, done.err
    assert check.steps(cwd / "runs/run") == [2]
    goes_on(llama, cwd)


@pytest.mark.fault(44)
def test_sigint_saves_and_tells_the_way_back(llama: Bench) -> None:
    cwd = llama.fresh("sigint")
    done = llama.start(cwd, {"signal_at": (STOPS["in mid-epoch"][0], "SIGINT")})
    assert done.code == 130, done.err
    assert "SIGINT: stopped after step 4 and saved" in done.err
    assert "go on with: lorakit train-llama" in done.err
    assert json.loads((cwd / "runs/run/checkpoints/step-000004/state.json").read_text())["step"] == 4
    goes_on(llama, cwd)

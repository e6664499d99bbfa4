"""`lorakit verify --resume` on a real recipe, in processes of its own."""

import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.torture import runs


def test_a_resumed_run_is_shown_to_be_equal(tmp_path: Path) -> None:
    recipe = runs.make("llama", tmp_path / "given")
    words = ["verify", str(recipe), "--resume", "--set", "train.steps=5000", "--set", "train.evaluate_every=0"]
    done = subprocess.run(
        [sys.executable, "-m", "lorakit", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "equal, bit for bit" in done.stdout
    hashes = [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert len(hashes) == 6
    assert all(len(digest) == 64 for digest in hashes)
    assert hashes[0::2] == hashes[1::2]
    assert len(set(hashes)) == 3
    assert list((tmp_path / "runs").iterdir()) == []


def test_stopped_by_sigterm_it_leaves_neither_a_run_nor_a_folder(tmp_path: Path) -> None:
    recipe = runs.make("llama", tmp_path / "given")
    words = ["verify", str(recipe), "--resume", "--set", "train.steps=5000"]
    done = subprocess.Popen(
        [sys.executable, "-m", "lorakit", *words], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    end = time.monotonic() + 120
    while not (trained := psutil.Process(done.pid).children()) and time.monotonic() < end:
        time.sleep(0.05)
    done.terminate()
    _, told = done.communicate(timeout=120)
    assert done.returncode == 75, told
    assert b"SIGTERM: stopped" in told
    assert not [child for child in trained if child.is_running()]
    assert list((tmp_path / "runs").iterdir()) == []


def test_killed_it_leaves_no_run_and_the_next_one_sweeps(tmp_path: Path) -> None:
    recipe = runs.make("llama", tmp_path / "given")
    command = [sys.executable, "-m", "lorakit", "verify", str(recipe), "--resume", "--set", "train.steps=100000"]
    killed = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not list((tmp_path / "runs").glob(".tmp-verify-*/*/checkpoints/*")) and time.monotonic() < end:
        time.sleep(0.05)
    trained = psutil.Process(killed.pid).children()
    killed.kill()
    killed.wait()
    assert trained
    assert not psutil.wait_procs(trained, timeout=60)[1]
    (left,) = (tmp_path / "runs").iterdir()
    next_one = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while left.exists() and time.monotonic() < end + 120:
        time.sleep(0.05)
    assert not left.exists()
    next_one.terminate()
    assert next_one.wait(60) == 75

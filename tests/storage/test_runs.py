import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.errors import ConflictError, RecipeError
from lorakit.storage.runs import RunFolder

HOLDER = (
    "import sys, time; from pathlib import Path; from lorakit.storage.runs import RunFolder\n"
    "run = RunFolder.open_new(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
)


def test_layout(tmp_path: Path) -> None:
    with RunFolder.open_new(tmp_path / "runs" / "name") as run:
        assert run.checkpoint(200) == tmp_path / "runs" / "name" / "checkpoints" / "step-000200"
        assert run.samples(7).parts[-2:] == ("samples", "step-000007")
        assert (run.root / ".lock").read_text() == f"{os.getpid()} on {socket.gethostname()}\n"
    assert os.listdir(run.root) == []


def test_a_used_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("x")
    with pytest.raises(ConflictError) as caught:
        RunFolder.open_new(tmp_path)
    assert "--resume" in caught.value.hint
    assert os.listdir(tmp_path) == ["recipe.yaml"]
    with RunFolder.open_existing(tmp_path) as run:
        assert run.recipe.read_text() == "x"


def test_resume_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no run"):
        RunFolder.open_existing(tmp_path / "none")


def test_leftovers_are_swept_under_the_lock(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".tmp-step").mkdir(parents=True)
    (tmp_path / ".tmp-x").write_text("")
    RunFolder.open_existing(tmp_path).close()
    assert [p.name for p in tmp_path.rglob("*")] == ["checkpoints"]


def test_other_ranks_take_no_lock(tmp_path: Path) -> None:
    with RunFolder.open_new(tmp_path / "a"), RunFolder(tmp_path / "a") as other:
        assert other.metrics.name == "metrics.jsonl"


@pytest.mark.parametrize("anew", [False, True], ids=["gone", "another's"])
def test_a_lock_file_that_a_run_removes_as_it_ends_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: bool
) -> None:
    """It ends between our opening the file and our locking it, and perhaps the next run has begun."""
    lock, flock, calls = tmp_path / ".lock", fcntl.flock, []

    def late(handle: int, operation: int) -> None:
        calls.append(handle)
        if len(calls) == 1:
            lock.unlink()
            if anew:
                lock.touch()
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with RunFolder.open_new(tmp_path):
        assert lock.read_text() == f"{os.getpid()} on {socket.gethostname()}\n"
        with pytest.raises(ConflictError, match="another run"):
            RunFolder.open_existing(tmp_path)


@pytest.mark.fault(53)
def test_a_second_process_conflicts_and_a_dead_ones_lock_is_recovered(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        for opening in (RunFolder.open_new, RunFolder.open_existing):
            with pytest.raises(ConflictError, match=f"process {holder.pid}\\b"):
                opening(tmp_path)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    assert (tmp_path / ".lock").read_text() == f"{holder.pid} on {socket.gethostname()}\n"
    with RunFolder.open_new(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()} on {socket.gethostname()}\n"

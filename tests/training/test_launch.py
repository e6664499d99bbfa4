import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lorakit.errors import ConflictError, NonFiniteError, RankError, RecipeError
from lorakit.recipe.schema import Compute
from lorakit.storage.runs import RunFolder
from lorakit.training import checkpoint, launch, metrics
from lorakit.training.launch import Session, open_session
from lorakit.training.loop import train
from lorakit.training.metrics import Silent
from tests.training.tiny_task import final_state, make_plan, make_task

BASE = {"batch_size": 8, "device": "cpu", "name": "adamw", "precision": "fp32"}
LAUNCHER = (
    "import sys; from lorakit.training.launch import relaunch\n"
    "sys.exit(relaunch(sys.argv[1:], 2, device='cpu', module='tests.training.rank_script'))"
)


@pytest.fixture
def session() -> Iterator[Session]:
    torch.set_num_threads(1)
    opened = open_session(Compute(device="cpu", precision="fp32"))
    yield opened
    opened.close()


def two_ranks(folder: Path, **options: Any) -> subprocess.Popen[str]:
    """Two real ranks over gloo, started by Accelerate's launcher through ``relaunch``."""
    command = [sys.executable, "-W", "error", "-c", LAUNCHER, str(folder), json.dumps({**BASE, **options})]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def relaunch(folder: Path, **options: Any) -> int:
    """The same, with this process as the launcher."""
    arguments = [str(folder), json.dumps({**BASE, **options})]
    return launch.relaunch(arguments, 2, device="cpu", module="tests.training.rank_script")


def in_process(session: Session, folder: Path, *, resume: bool = False, **options: Any) -> dict[str, Tensor]:
    given = {**BASE, **options}
    task = make_task(session, given)
    opening = RunFolder.open_existing if resume else RunFolder.open_new
    with opening(folder) as run:
        train(task, session, make_plan(given, resume=resume, allow=resume), run, Silent())
    return final_state(task)


def ranks_alive(folder: Path) -> list[str]:
    command = ["ps", "-eo", "pid,args"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if str(folder) in line]


def test_two_ranks_learn_what_one_process_learns(
    session: Session, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """1 x 8 and 2 ranks x 2 x 2: the last gradient and the adapter after six updates, and the held-out losses. Each
    rank draws dropout's masks from seeds of its own."""
    expected = in_process(session, tmp_path / "one", steps=6)
    assert relaunch(tmp_path / "two", steps=6, gradient_accumulation=2) == 0
    assert capfd.readouterr().out.count("step 6 ") == 1
    ranks: list[dict[str, Tensor]] = [load_file(tmp_path / "two" / f"rank-{rank}.safetensors") for rank in (0, 1)]
    for key, value in expected.items():
        assert torch.equal(ranks[0][key], ranks[1][key])
        torch.testing.assert_close(ranks[0][key], value, rtol=1e-4, atol=2e-6)
    assert len({seed for rank in ranks for seed in rank["seeds"].tolist()}) == 6 * 2 * 2
    rows = [metrics.read(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    one, two = ([row["held_out_loss"] for row in part if "held_out_loss" in row] for part in rows)
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.fault(44)
def test_a_signal_stops_all_ranks_after_the_same_step_and_one_process_goes_on(session: Session, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with two_ranks(folder, steps=40, delay=0.05) as process:
        for line in process.stdout:
            if line.startswith("step 3 "):
                process.send_signal(signal.SIGTERM)
        err = process.stderr.read()
    assert process.returncode == 75, err
    found = checkpoint.newest(RunFolder(folder)).state
    assert (found.world, 4 <= found.step < 40) == (2, True)
    assert err.count(f"stopped after step {found.step} and saved | go on with: lorakit train --resume") == 2
    assert not ranks_alive(folder)
    expected = in_process(session, tmp_path / "straight", steps=40)
    state = in_process(session, folder, steps=40, resume=True)
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-5)


def test_ranks_that_find_different_checkpoints_are_refused(
    session: Session, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    in_process(session, tmp_path / "0", steps=6, checkpoint_every=2)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    shutil.rmtree(tmp_path / "1" / "checkpoints" / "step-000006")
    assert relaunch(tmp_path, steps=6, checkpoint_every=2, resume=True, apart=True) == 7
    assert "error: rank 1 does not have the checkpoint of rank 0 | " in capfd.readouterr().err


@pytest.mark.fault(48)
def test_nan_on_one_rank_is_named_by_all_and_nothing_is_saved(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert relaunch(tmp_path / "run", steps=10, nan_at="line:17") == NonFiniteError.exit_code
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 2
    assert told[0] == told[1]
    assert "line:17" in told[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.fault(51)
@pytest.mark.parametrize("fate", ["SIGKILL", "SIGSTOP"])
def test_a_rank_killed_or_frozen_ends_all_in_time(tmp_path: Path, capfd: pytest.CaptureFixture[str], fate: str) -> None:
    """The frozen one is killed by the other, because it heeds no other signal."""
    with pytest.raises(RankError, match="rank 1 was killed by SIGKILL"):
        relaunch(tmp_path / "run", steps=1000, fate=fate, delay=0.02)
    ended = time.time()
    assert not ranks_alive(tmp_path / "run")
    out, err = capfd.readouterr()
    (since,) = (float(line.split()[1]) for line in out.splitlines() if line.startswith("fate "))
    assert ended - since < 15
    assert "rank 1 (process" in err or fate == "SIGKILL"


def test_no_rank_outlives_a_killed_launcher(tmp_path: Path) -> None:
    with two_ranks(tmp_path / "run", steps=100_000, delay=0.05) as process:
        for line in process.stdout:
            if line.startswith("step 2 "):
                process.kill()
        process.stderr.read()
    end = time.monotonic() + 60
    while ranks_alive(tmp_path / "run") and time.monotonic() < end:
        time.sleep(0.1)
    assert not ranks_alive(tmp_path / "run")


def test_device_cpu_is_honoured(session: Session) -> None:
    assert (session.rank, session.world, session.device.type, session.is_main) == (0, 1, "cpu", True)
    assert session.dtype == torch.float32
    total = torch.tensor([2.0])
    assert session.all_sum(total) is total
    assert session.gather("x") == ["x"]


def test_rank_0s_error_is_raised(session: Session) -> None:
    with pytest.raises(ConflictError):
        session.on_main(lambda: (_ for _ in ()).throw(ConflictError("in the way")))


def test_precisions(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RecipeError, match="fp16 needs a GPU"):
        open_session(Compute(device="cpu", precision="fp16"))
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"avx512_bf16": has})
        for precision, dtype in (("auto", expected), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
            opened = open_session(Compute(device="cpu", precision=precision))
            assert opened.dtype == dtype
            opened.close()
    assert [record.message for record in caplog.records if "bf16" in record.message] == [
        "this device has no bf16 instructions: bf16 will be much slower than fp32"
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_not_there() -> None:
    with pytest.raises(RecipeError, match="no CUDA"):
        open_session(Compute(device="cuda"))


def test_a_missing_tracker_names_its_package(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(RecipeError) as caught:
        session.track(["tensorboard", "trackio"], tmp_path, "run", {})
    assert caught.value.hint == "pip install trackio"

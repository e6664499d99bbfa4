import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate.commands import launch as accelerate_launch
from accelerate.commands.config import config_args
from safetensors.torch import load_file
from torch import Tensor, distributed

from lorakit.adapters.inject import inject
from lorakit.errors import ConflictError, NonFiniteError, RankError, RecipeError
from lorakit.recipe.schema import Adapter, Compute
from lorakit.storage.runs import RunFolder
from lorakit.training import checkpoint, device, launch, metrics
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
    """As systemd sends it, to the whole tree of processes: each rank has it twice, and once more as SIGHUP."""
    folder = tmp_path / "run"
    with two_ranks(folder, steps=40, delay=0.05) as process:
        for line in process.stdout:
            if line.startswith("step 3 "):
                for one in (launcher := psutil.Process(process.pid), *launcher.children()):
                    one.send_signal(signal.SIGTERM)
                    one.send_signal(signal.SIGHUP)
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


@pytest.mark.fault(44)
@pytest.mark.parametrize("again", ["ranks", "launcher"])
def test_the_launchers_second_signal_ends_all_and_a_ranks_does_not(tmp_path: Path, again: str) -> None:
    """A busy launcher may pass on late what each rank has had directly."""
    with two_ranks(tmp_path / "run", steps=40, delay=2 if again == "ranks" else 6) as process:
        for line in process.stdout:
            if line.startswith("step 1 "):
                launcher = psutil.Process(process.pid)
                launcher.send_signal(signal.SIGTERM)
                time.sleep(1.3)
                for one in [launcher] if again == "launcher" else launcher.children():
                    one.send_signal(signal.SIGTERM)
        err = process.stderr.read()
    assert process.returncode == (75 if again == "ranks" else 130), err
    assert (tmp_path / "run/checkpoints/step-000002").exists() == (again == "ranks")
    assert not ranks_alive(tmp_path / "run")


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
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a user's own configuration of Accelerate, made for one GPU."""
    (tmp_path / "config.json").write_text('{"distributed_type": "NO", "mixed_precision": "fp16", "gpu_ids": "0"}')
    for module in (accelerate_launch, config_args):
        monkeypatch.setattr(module, "default_config_file", str(tmp_path / "config.json"))
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


@pytest.mark.parametrize(("given", "each"), [("6,2", "3"), ("8", "4"), ("auto", None)])
def test_cores_are_shared_by_the_ranks(monkeypatch: pytest.MonkeyPatch, given: str, each: str | None) -> None:
    """OMP_NUM_THREADS may be a list, by level of nesting."""
    seen: list[Any] = []
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(accelerate_launch, "launch_command", seen.append)
    assert launch.relaunch([], 2, device="cpu") == 0
    expected = each or str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert str(seen[0].num_cpu_threads_per_process) == expected


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_gpu_whose_driver_is_too_old(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """NVML counts it, CUDA does not start: the run goes to the CPU and says so."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RecipeError, match=r"^compute.device: there is a GPU, but CUDA does not start"):
        device.choose(Compute(device="cuda"))
    chosen, _ = device.choose(Compute(precision="fp32"))
    assert (chosen.type, "taking the CPU" in caplog.text) == ("cpu", True)
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8)})
    inject(model, Adapter(rank=2, targets=["q_proj"]), {}, seed=0)  # asks no GPU for its random state


def test_products_are_not_rounded_on_the_way() -> None:
    device.choose(Compute(device="cpu", precision="fp32"))
    matmul = torch.backends.cuda.matmul
    reduced = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    assert not any([torch.backends.cudnn.allow_tf32, matmul.allow_tf32, *reduced])
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(("given", "taken"), [(None, ":4096:8"), (":4096:2:16:8", ":4096:8"), (":16:8", ":16:8")])
def test_cublas_gets_a_workspace_with_which_its_sums_have_an_order(
    monkeypatch: pytest.MonkeyPatch, given: str | None, taken: str
) -> None:
    if given is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    else:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: None)
    device.make_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == taken


def lost(_: object) -> None:
    raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")


def gone(_: object) -> None:
    raise distributed.DistBackendError(
        "NCCL error in: x.cpp, ncclRemoteError: a network error or a remote process exiting"
    )


def misplaced(_: object) -> None:
    text = "NCCL error: invalid usage\nncclInvalidUsage: ...\nLast error:\nDuplicate GPU detected : rank 0 and rank 1"
    raise distributed.DistBackendError(text)


def full(_: object) -> None:
    text = (
        "NCCL error: unhandled system error\nncclSystemError: System call (e.g. socket, malloc) or library call failed"
    )
    raise distributed.DistBackendError(f"{text}\nLast error:\nError while creating shared memory segment /dev/shm/x")


def broken(_: object) -> None:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("work", "kind", "told"),
    [
        (lost, RankError, "^another rank is gone$"),
        (gone, RankError, "^another rank is gone$"),
        (misplaced, RankError, "^the ranks cannot reach one another: Duplicate GPU detected : rank 0 and rank 1$"),
        (
            full,
            RankError,
            "^the ranks cannot reach one another: Error while creating shared memory segment /dev/shm/x$",
        ),
        (broken, torch.AcceleratorError, "illegal memory access"),
    ],
)
def test_an_exchange_that_fails_says_why(
    session: Session, work: Any, kind: type[Exception], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "all_reduce", work)
    with pytest.raises(kind, match=told):
        replace(session, world=2).all_sum(torch.zeros(1))


def test_a_missing_tracker_names_its_package(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(RecipeError) as caught:
        session.track(["tensorboard", "trackio"], tmp_path, "run", {})
    assert caught.value.hint == "pip install trackio"

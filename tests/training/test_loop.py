import copy
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from lorakit.errors import (
    CheckpointError,
    DataError,
    ModelError,
    NonFiniteError,
    RecipeError,
    ResourceError,
    Stopped,
)
from lorakit.numerics.order import Layout, update
from lorakit.recipe.schema import Compute, Train
from lorakit.storage import manifest
from lorakit.storage.fingerprint import Fingerprint
from lorakit.storage.runs import RunFolder
from lorakit.training import checkpoint, device, loop, metrics, optim
from lorakit.training.launch import Session, open_session
from lorakit.training.loop import LEAST_SCALE, Outcome, train
from lorakit.training.metrics import Silent
from tests.training import tiny_task
from tests.training.tiny_task import EXAMPLES, HELD_OUT, TinyTask, final_state, make_plan, make_task

STEPS = 12


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    torch.set_num_threads(1)
    opened = open_session(Compute(device="cpu", precision="fp32"))
    yield opened
    opened.close()


class Signal(Silent):
    """Sends this process a real signal after a step, and keeps what it was told."""

    def __init__(self, after: int = -1, number: int = signal.SIGTERM) -> None:
        self.after, self.number, self.told = after, number, []

    def step(self, step: int, *_: float) -> None:
        self.told.append(step)
        if step == self.after:
            os.kill(os.getpid(), self.number)


def go(
    session: Session, folder: Path, progress: Silent | None = None, **given: Any
) -> tuple[Outcome, dict[str, Tensor], TinyTask]:
    task_options = {key: given.pop(key) for key in ("nan_at", "delay", "samples") if key in given}
    call = {key: given.pop(key) for key in ("resume", "allow", "sample_every", "track", "recipe_text") if key in given}
    options = {"steps": STEPS, "batch_size": 8, "name": "adamw", **given}
    task = make_task(session, options, **task_options)
    opening = RunFolder.open_existing if call.get("resume") else RunFolder.open_new
    with opening(folder) as run:
        outcome = train(task, session, make_plan(options, **call), run, progress or Silent())
    return outcome, final_state(task), task


@pytest.fixture
def deterministic() -> Iterator[None]:
    """As on a GPU."""
    device.make_deterministic()
    yield
    torch.use_deterministic_algorithms(False)


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def steps_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_gradient_is_that_of_the_mean_over_the_batch(session: Session, tmp_path: Path) -> None:
    """Against autograd in float64 on the whole batch at once."""
    task = TinyTask(Layout(0, 8), share=0.0)
    reference = copy.deepcopy(task.model).double()
    xs, labels = zip(*(task.example(d.index) for d in update(Layout(0, 8), task.lengths[:EXAMPLES], 0)), strict=True)
    loss = cross_entropy(reference(torch.cat(xs).double()), torch.cat(labels))
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in reference.parameters() if p.grad is not None]).norm()

    _, state, _ = go(session, tmp_path / "run", steps=1, clip=0)
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(state[f"{name}.grad"].double(), parameter.grad, rtol=1e-5, atol=1e-8)
    row = metrics.read(tmp_path / "run" / "metrics.jsonl")[1]
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)

    _, clipped, _ = go(session, tmp_path / "clipped", steps=1, clip=norm.item() / 2)
    for key in [key for key in state if key.endswith("grad")]:
        torch.testing.assert_close(clipped[key], state[key] / 2, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("accumulation", [2, 8])
def test_accumulation_gives_the_same_update(session: Session, tmp_path: Path, accumulation: int) -> None:
    _, whole, _ = go(session, tmp_path / "whole")
    _, parts, _ = go(session, tmp_path / "parts", gradient_accumulation=accumulation)
    for key in whole:
        torch.testing.assert_close(parts[key], whole[key], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_resumed_run_is_bit_equal(session: Session, tmp_path: Path, name: str) -> None:
    """Stopped by a real signal in mid-epoch (5 steps an epoch), twice, with dropout and accumulation."""
    options = {"name": name, "dropout": 0.3, "gradient_accumulation": 2, "evaluate_every": 4}
    straight, expected, _ = go(session, tmp_path / "straight", **options)
    # The signal comes after a step was counted: the next one is finished and saved, or the held-out loss of step 8.
    for after, saved, more in ((2, 3, {}), (8, 8, {"resume": True})):
        with pytest.raises(Stopped) as caught:
            go(session, tmp_path / "run", Signal(after), **options, **more)
        assert f"step {saved} " in caught.value.reason
    last = Signal()
    outcome, state, _ = go(session, tmp_path / "run", last, **options, resume=True)
    assert last.told == [9, 10, 11, 12]
    assert same(state, expected)
    assert (outcome.last_held_out, outcome.count) == (straight.last_held_out, straight.count)
    rows, reference = (metrics.read(tmp_path / f / "metrics.jsonl") for f in ("run", "straight"))
    losses = [[(r["step"], r.get("loss"), r.get("held_out_loss")) for r in part] for part in (rows, reference)]
    assert losses[0] == losses[1]


def test_a_finished_run_of_constant_rate_becomes_longer(session: Session, tmp_path: Path) -> None:
    options = {"schedule": "constant", "warmup": 0, "dropout": 0.3}
    _, expected, _ = go(session, tmp_path / "straight", **options)
    go(session, tmp_path / "run", steps=5, **options)
    _, state, _ = go(session, tmp_path / "run", resume=True, allow=True, **options)
    assert same(state, expected)


def test_dropout_changes_the_run_so_that_the_test_above_means_something(session: Session, tmp_path: Path) -> None:
    runs = [go(session, tmp_path / str(i), dropout=0.3, seed=s, steps=2)[1] for i, s in enumerate((0, 0, 1))]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])
    assert not same(runs[0], go(session, tmp_path / "none", steps=2)[1])


def test_every_micro_batch_draws_other_dropout_masks(session: Session, tmp_path: Path) -> None:
    tasks = [go(session, tmp_path / str(s), gradient_accumulation=2, seed=s, steps=3)[2] for s in (0, 1)]
    assert [len(task.seeds) for task in tasks] == [6, 6]
    assert len({seed for task in tasks for seed in task.seeds}) == 12


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_names_the_way_back(session: Session, tmp_path: Path, number: int, code: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as caught:
        go(session, tmp_path / "run", Signal(2, number))
    assert caught.value.exit_code == code
    assert "lorakit train --resume" in caught.value.hint
    assert steps_of(tmp_path / "run") == ["step-000003"]
    assert signal.getsignal(number) is before


def test_held_out_loss_is_the_mean_over_items(session: Session, tmp_path: Path) -> None:
    outcome, _, task = go(session, tmp_path / "run", dropout=0.5, evaluate_every=5)
    task.model.eval()
    with torch.no_grad():
        losses = [task.loss(task.batch([EXAMPLES + i])) for i in range(HELD_OUT)]
    assert outcome.last_held_out == pytest.approx(sum(losses).item() / sum(task.lengths[EXAMPLES:]), rel=1e-6)
    rows = [row for row in metrics.read(tmp_path / "run" / "metrics.jsonl") if "held_out_loss" in row]
    assert [row["step"] for row in rows] == [0, 5, 10, 12]
    assert rows[0]["held_out_loss"] == outcome.first_held_out
    assert rows[0]["twice"] == 2 * rows[0]["held_out_loss"]
    assert outcome.last_held_out < outcome.first_held_out


def test_measuring_changes_nothing(session: Session, tmp_path: Path) -> None:
    _, plain, _ = go(session, tmp_path / "a", dropout=0.3)
    _, busy, _ = go(session, tmp_path / "b", dropout=0.3, evaluate_every=1, sample_every=2, samples=True)
    assert same(plain, busy)
    made = sorted(path.parent.name for path in (tmp_path / "b" / "samples").rglob("answer.txt"))
    assert made == [f"step-{step:06d}" for step in (0, 2, 4, 6, 8, 10, 12)]
    assert not list((tmp_path / "a").glob("samples/*"))


def test_checkpoints_by_steps_are_pruned(session: Session, tmp_path: Path) -> None:
    go(session, tmp_path / "run", checkpoint_every=5, keep_checkpoints=2)
    assert steps_of(tmp_path / "run") == ["step-000010", "step-000012"]


def test_checkpoints_by_minutes(session: Session, tmp_path: Path) -> None:
    go(session, tmp_path / "run", steps=4, checkpoint_every=0, checkpoint_minutes=1e-9, keep_checkpoints=9)
    assert steps_of(tmp_path / "run") == [f"step-{step:06d}" for step in (1, 2, 3, 4)]


class Clock:
    """Time that passes where something sleeps, and nowhere else."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_minutes_count_from_the_last_checkpoint(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute an update: each third is due."""
    clock = Clock()
    for module in (loop, tiny_task):
        monkeypatch.setattr(module, "time", clock)
    options = {"checkpoint_every": 0, "checkpoint_minutes": 2.5, "keep_checkpoints": 9}
    go(session, tmp_path / "run", delay=60, **options)
    assert steps_of(tmp_path / "run") == [f"step-{step:06d}" for step in (3, 6, 9, 12)]


@pytest.mark.fault(47)
def test_a_corrupt_newest_checkpoint_gives_way_to_the_one_before(
    session: Session, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, expected, _ = go(session, tmp_path / "straight", dropout=0.3)
    with pytest.raises(Stopped):
        go(session, tmp_path / "run", Signal(7), dropout=0.3, checkpoint_every=4)
    newest = tmp_path / "run" / "checkpoints" / "step-000008" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x55")
    with caplog.at_level(logging.WARNING, "lorakit"):
        _, state, _ = go(session, tmp_path / "run", dropout=0.3, checkpoint_every=4, resume=True)
    assert str(newest) in caplog.text
    assert same(state, expected)
    manifest.check_manifest(newest.parent)


@pytest.mark.fault(47)
def test_no_good_checkpoint_is_never_a_silent_restart(session: Session, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        go(session, tmp_path / "run", Signal(2))
    (tmp_path / "run" / "checkpoints" / "step-000003" / "adapter.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is intact"):
        go(session, tmp_path / "run", resume=True)


@pytest.mark.fault(55)
def test_resume_refuses_another_run(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        go(session, folder, Signal(2))
    with pytest.raises(RecipeError, match=r"optimizer\.learning_rate"):
        go(session, folder, resume=True, learning_rate=1e-3, allow=True)
    with pytest.raises(RecipeError, match=r"train\.checkpoint_every"):
        go(session, folder, resume=True, checkpoint_every=3)
    others = (("fingerprint", Fingerprint((), ()), DataError), ("base_id", "tiny sha256:1", ModelError))
    for field, other, kind in others:
        with monkeypatch.context() as patch:
            patch.setattr(TinyTask, field, other)
            with pytest.raises(kind):
                go(session, folder, resume=True)
    outcome, _, _ = go(session, folder, resume=True, checkpoint_every=3, allow=True)
    assert outcome.steps == STEPS


def test_a_run_killed_before_it_could_prune_prunes_when_it_is_resumed(session: Session, tmp_path: Path) -> None:
    go(session, tmp_path / "run", checkpoint_every=4, keep_checkpoints=3)
    assert len(steps_of(tmp_path / "run")) == 3
    options = {"allow": True, "resume": True, "checkpoint_every": 4}
    go(session, tmp_path / "run", keep_checkpoints=2, **options)
    assert steps_of(tmp_path / "run") == ["step-000008", "step-000012"]


@pytest.mark.usefixtures("deterministic")
@pytest.mark.filterwarnings("ignore:put_ does not have a deterministic:UserWarning")
def test_an_update_is_strictly_deterministic_as_far_as_its_operations_are(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """``put_`` is not, on the CPU either: the third update, begun anew with the same batches, and all others allow it.
    What is measured between updates is not held to it."""
    _, expected, plain = go(session, tmp_path / "plain", gradient_accumulation=2)
    strict: dict[bool, list[bool]] = {True: [], False: []}
    loss = TinyTask.loss

    def put_from_the_sixth(self: TinyTask, batch: tiny_task.TinyBatch) -> Tensor:
        strict[self.model.training].append(not torch.is_deterministic_algorithms_warn_only_enabled())
        if not self.model.training or len(strict[True]) > 5:
            torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
        return loss(self, batch)

    monkeypatch.setattr(TinyTask, "loss", put_from_the_sixth)
    with caplog.at_level(logging.WARNING):
        _, state, task = go(session, tmp_path / "run", gradient_accumulation=2)
    assert same(state, expected)
    assert strict[True] == [True] * 6 + [False] * 2 * (STEPS - 2)
    assert not any(strict[False])
    assert task.seeds == plain.seeds[:5] + plain.seeds[4:]
    (told,) = [record.getMessage() for record in caplog.records if "bit-equal" in record.getMessage()]
    assert told.startswith("a resumed run will not be bit-equal: put_ does not have a deterministic implementation")


def test_a_finished_run_can_be_resumed_without_harm(session: Session, tmp_path: Path) -> None:
    first, _, _ = go(session, tmp_path / "run")
    saved = load_file(tmp_path / "run" / "run.safetensors")
    again, _, _ = go(session, tmp_path / "run", resume=True)
    assert same(load_file(tmp_path / "run" / "run.safetensors"), saved)
    assert again == first


def test_the_recipe_in_the_run_folder_is_that_of_the_newest_start(session: Session, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        go(session, folder, Signal(2))
    assert (folder / "recipe.yaml").read_text() == "tiny\n"
    changed = {"resume": True, "checkpoint_every": 3, "recipe_text": "changed\n"}
    with pytest.raises(RecipeError):
        go(session, folder, **changed)
    assert (folder / "recipe.yaml").read_text() == "tiny\n"
    go(session, folder, **changed, allow=True)
    assert (folder / "recipe.yaml").read_text() == "changed\n"


@pytest.mark.fault(48)
def test_nan_stops_before_the_update_and_saves_nothing(session: Session, tmp_path: Path) -> None:
    options = {"gradient_accumulation": 4, "steps": 5, "nan_at": "line:17"}
    step = next(s for s in range(5) if 17 in [d.index for d in update(Layout(0, 8), order_keys(), s)])
    with pytest.raises(NonFiniteError) as caught:
        go(session, tmp_path / "run", **options)
    reason = caught.value.reason
    assert f"loss of step {step + 1} is not finite (rank 0: " in reason
    assert "line:17" in reason
    assert reason.count("line:") == 2
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "run.safetensors").exists()


def order_keys() -> list[int]:
    return TinyTask(Layout(0, 8), share=0.0).lengths[:EXAMPLES]


@pytest.mark.fault(48)
def test_a_held_out_loss_that_is_not_finite_stops_the_run(session: Session, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="held-out loss after step 0 is not finite"):
        go(session, tmp_path / "run", steps=2, nan_at=f"line:{EXAMPLES + 2}")


@pytest.mark.parametrize("scale", [None, LEAST_SCALE])
def test_an_infinite_gradient_of_a_finite_loss_is_caught(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float | None
) -> None:
    """With fp16's loss scale too, where it cannot go lower."""
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    monkeypatch.setattr(session.accelerator, "scaler", scaler)
    task = TinyTask(Layout(0, 8), share=0.0)
    gentle = task.loss
    task.loss = lambda batch: Steepest.apply(gentle(batch))
    before = {key: value.detach().clone() for key, value in task.adapter_state().items()}
    with RunFolder.open_new(tmp_path / "run") as run, pytest.raises(NonFiniteError, match="gradient of step 1"):
        train(task, session, make_plan({"steps": 2, "name": "adamw"}), run, Silent())
    assert all(torch.equal(value, before[key]) for key, value in task.adapter_state().items())


class Steepest(torch.autograd.Function):
    """The identity with an infinite derivative."""

    @staticmethod
    def forward(_ctx, x):
        return x.clone()

    @staticmethod
    def backward(_ctx, grad):
        return grad * float("inf")


@pytest.mark.fault(50)
def test_a_loader_error_comes_through(session: Session, tmp_path: Path) -> None:
    task = TinyTask(Layout(0, 8), share=0.0)
    whole = task.batches

    def broken(split: str, start: int):
        for number, batch in enumerate(whole(split, start)):
            if split == "train" and number == 3:
                raise DataError("bad row", where="chats.jsonl:12")
            yield batch

    task.batches = broken
    with RunFolder.open_new(tmp_path / "run") as run, pytest.raises(DataError, match=r"chats\.jsonl:12"):
        train(task, session, make_plan({"steps": 9, "name": "adamw"}), run, Silent())
    assert [t.name for t in threading.enumerate() if "prefetch" in t.name] == []


@pytest.mark.fault(49)
def test_too_little_memory_says_what_to_lower(session: Session, tmp_path: Path) -> None:
    task = TinyTask(Layout(0, 8), share=0.0)
    task.loss = lambda _batch: torch.zeros(1 << 60)
    with RunFolder.open_new(tmp_path / "run") as run, pytest.raises(ResourceError) as caught:
        train(task, session, make_plan({"steps": 1, "name": "adamw"}), run, Silent())
    assert "gradient_accumulation" in caught.value.hint


def test_batch_must_divide() -> None:
    with pytest.raises(RecipeError, match="8 examples do not divide into 6"):
        optim.check_division(Train(), Compute(gradient_accumulation=3), 2)
    optim.check_division(Train(), Compute(gradient_accumulation=4), 2)


def test_loss_scaling_leaves_the_update_as_it_is_and_survives_an_overflow(session: Session, tmp_path: Path) -> None:
    """Powers of two scale exactly. The scaler is the one Accelerate uses, here on the CPU and in float32."""
    _, expected, _ = go(session, tmp_path / "plain", steps=6)
    session.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    try:
        _, scaled, _ = go(session, tmp_path / "scaled", steps=6)
        for key in expected:
            torch.testing.assert_close(scaled[key], expected[key], rtol=1e-6, atol=1e-8)
        session.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        outcome, _, _ = go(session, tmp_path / "overflow", steps=6)
        rows = [row for row in metrics.read(tmp_path / "overflow" / "metrics.jsonl") if "loss" in row]
        assert "grad_norm" not in rows[0]
        assert outcome.steps == 6
        state = checkpoint.newest(RunFolder(tmp_path / "overflow")).state
        assert 1 < state.scaler["scale"] < 2.0**127
    finally:
        session.accelerator.scaler = None


def test_total_steps() -> None:
    assert optim.total_steps(Train(steps=7), 100.0) == 7
    assert optim.total_steps(Train(), 12.25) == 13
    assert optim.total_steps(Train(epochs=2), 12.5) == 25
    assert optim.total_steps(Train(epochs=3), 0.1) == 1
    assert optim.total_steps(Train(epochs=0.1), 30.0) == 3


def start(folder: Path, options: Mapping[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.training.rank_script", str(folder), json.dumps(dict(options))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.fault(44)
def test_a_terminated_process_exits_75_and_resumes_bit_equal(session: Session, tmp_path: Path) -> None:
    options = {"steps": 40, "batch_size": 8, "device": "cpu", "dropout": 0.2, "precision": "fp32", "name": "adamw"}
    with start(tmp_path / "run", {**options, "delay": 0.02}) as process:
        for line in process.stdout:
            if line.startswith("step 7 "):
                process.terminate()
        told = process.stderr.read()
    assert process.returncode == 75
    assert "lorakit train --resume" in told
    left = metrics.read(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert 7 <= left < 40
    _, expected, _ = go(session, tmp_path / "straight", **options)
    _, state, _ = go(session, tmp_path / "run", **options, resume=True)
    assert same(state, expected)


@pytest.mark.fault(43)
def test_a_killed_process_leaves_a_good_checkpoint(session: Session, tmp_path: Path) -> None:
    """Killed after the tenth checkpoint and 0 to 50 ms, saving at every step: most of the time in the middle of one."""
    options = {"steps": 400, "batch_size": 8, "device": "cpu", "checkpoint_every": 1, "precision": "fp32"}
    options["name"] = "adamw"
    with start(tmp_path / "run", options) as process:
        for line in process.stdout:
            if line.startswith("step 10 "):
                time.sleep(time.time() % 0.05)
                process.kill()
                break
        process.stdout.read()
    assert process.returncode == -signal.SIGKILL
    run = RunFolder(tmp_path / "run")
    found = checkpoint.newest(run)
    assert found.state.step >= 9
    plan = make_plan(options)
    progress = Signal(found.state.step + 1)
    task = make_task(session, options)
    with RunFolder.open_existing(run.root) as again, pytest.raises(Stopped):
        train(task, session, replace(plan, resume=True), again, progress)
    assert not list(run.root.rglob(".tmp-*"))
    straight = TinyTask(Layout(0, 8), share=0.0)
    with RunFolder.open_new(tmp_path / "straight") as other, pytest.raises(Stopped):
        train(straight, session, plan, other, Signal(found.state.step + 1))
    assert same(final_state(task), final_state(straight))

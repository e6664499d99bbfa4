import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lorakit.errors import DataError
from lorakit.recipe.schema import Compute
from lorakit.storage.runs import RunFolder
from lorakit.training import metrics
from lorakit.training.launch import Session, open_session
from lorakit.training.loop import train
from lorakit.training.metrics import Silent
from tests.training.tiny_task import make_plan, make_task

OPTIONS = {"steps": 5, "batch_size": 8, "name": "adamw"}


@pytest.fixture
def session() -> Iterator[Session]:
    torch.set_num_threads(1)
    opened = open_session(Compute(device="cpu", precision="fp32"))
    yield opened
    opened.close()


def test_a_run_leaves_lines_a_picture_and_tensorboard_events(session: Session, tmp_path: Path) -> None:
    with RunFolder.open_new(tmp_path / "run") as run:
        train(make_task(session, OPTIONS), session, make_plan(OPTIONS, track=["tensorboard"]), run, Silent())
    rows = metrics.read(run.metrics)
    assert [(row["step"], "held_out_loss" in row) for row in rows] == [
        (0, True),
        *((step, False) for step in (1, 2, 3, 4, 5)),
        (5, True),
    ]
    expected = {"step", "loss", "learning_rate", "grad_norm", "examples_per_second", "count_per_second", "seconds"}
    assert rows[1].keys() == expected
    with Image.open(run.loss_png) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10
    for tracker in session.accelerator.trackers:
        tracker.finish()
    (events,) = run.tracking.rglob("events.out.tfevents*")
    read = EventAccumulator(str(events.parent))
    read.Reload()
    told = [number for event in read.Scalars("loss") for number in (event.step, event.value)]
    written = [number for row in rows if "loss" in row for number in (row["step"], row["loss"])]
    assert told == pytest.approx(written, rel=1e-6)
    assert [event.step for event in read.Scalars("held_out_loss")] == [0, 5]


def test_cut_keeps_what_a_checkpoint_knows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kinds = [(0, "held_out_loss"), (1, "loss"), (2, "loss"), (2, "held_out_loss"), (3, "loss")]
    path.write_text("".join(json.dumps({"step": s, kind: 1.0}) + "\n" for s, kind in kinds) + '{"step": 4, "lo')
    metrics.cut(path, step=2, evaluated=0)
    kept = [(row["step"], next(key for key in row if key != "step")) for row in metrics.read(path)]
    assert kept == kinds[:3]
    metrics.cut(tmp_path / "new.jsonl", step=0, evaluated=-1)
    assert (tmp_path / "new.jsonl").read_text() == ""


@pytest.mark.parametrize("spoilt", [b"\0" * 40 + b"\n", b'{"st\n{"step": 3, "loss": 1}\n', b"\xff\n"])
def test_what_a_power_cut_spoilt_after_the_checkpoint_is_cut_too(tmp_path: Path, spoilt: bytes) -> None:
    path, good = tmp_path / "metrics.jsonl", b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'
    path.write_bytes(good + spoilt)
    metrics.cut(path, step=2, evaluated=-1)
    assert path.read_bytes() == good
    path.write_bytes(spoilt + good)
    with pytest.raises(DataError, match=r"jsonl:1\b"):
        metrics.cut(path, step=2, evaluated=-1)


def test_a_spoilt_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[]\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        metrics.read(path)


def test_smoothing_is_a_mean_with_fading_weights() -> None:
    losses = [4.0, 2.0, 3.0]
    b = metrics.SMOOTHING
    assert metrics.smooth([2.5] * 9) == pytest.approx([2.5] * 9)
    expected = (b * b * 4 + b * 2 + 3) / (b * b + b + 1)
    assert metrics.smooth(losses)[-1] == pytest.approx(expected)


def test_a_picture_of_nothing_yet(tmp_path: Path) -> None:
    metrics.draw([], tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size == (800, 450)

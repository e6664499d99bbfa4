"""A run that is resumed on other data is refused, and told which examples changed (fault 55): real files, real runs."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.faults.conftest import row
from tests.faults.harness import lorakit

SINCE = "the training data changed since the run was started"


def add_row(folder: Path) -> None:
    path = folder / "chats.jsonl"
    path.write_text(row(77) + path.read_text())


def remove_row(folder: Path) -> None:
    lines = (folder / "chats.jsonl").read_text().splitlines(keepends=True)
    (folder / "chats.jsonl").write_text("".join(lines[:2] + lines[3:]))


def alter_rows(folder: Path) -> None:
    (folder / "chats.jsonl").write_text((folder / "chats.jsonl").read_text().replace("It is", "It was"))


def blank_line(folder: Path) -> None:
    (folder / "chats.jsonl").write_text("\n" + (folder / "chats.jsonl").read_text())


def swap_rows(folder: Path) -> None:
    first, second, *rest = (folder / "chats.jsonl").read_text().splitlines(keepends=True)
    (folder / "chats.jsonl").write_text("".join([second, first, *rest]))


@pytest.mark.fault(55)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (add_row, "added {chats}:1"),
        (remove_row, "removed {chats}:3"),
        (alter_rows, "altered {chats}:1, {chats}:2, {chats}:3 and 5 more"),
        (swap_rows, "the same examples in another order, or taken more or less often"),
        (blank_line, ""),
    ],
)
def test_chats(llama: Path, change: Callable[[Path], None], told: str) -> None:
    assert lorakit("train-llama", llama / "recipe.yaml").code == 0
    change(llama)
    again = lorakit("train-llama", llama / "recipe.yaml", "--resume")
    if not told:
        assert again.code == 0, again.err
        return
    again.refused(3)
    assert again.error.endswith(f"{SINCE}: {told.format(chats=llama / 'chats.jsonl')}")
    assert "put the data back" in again.err.splitlines()[-1]


@pytest.mark.fault(55)
def test_pictures(sd: Path) -> None:
    assert lorakit("train-sd", sd / "recipe.yaml", "--set", "data.flip=true").code == 0
    pictures = sd / "pictures"
    (pictures / "0.txt").write_text("another caption")
    Image.new("RGB", (40, 40), "red").save(pictures / "1.png")
    (pictures / "2.png").unlink()
    (pictures / "2.txt").unlink()
    Image.new("RGB", (40, 40), "blue").save(pictures / "new.png")
    (pictures / "new.txt").write_text("new")
    again = lorakit("train-sd", sd / "recipe.yaml", "--set", "data.flip=true", "--resume").refused(3)
    assert again.error.endswith(f"{SINCE}: added new.png; removed 2.png; altered 0.png, 1.png")


@pytest.mark.fault(55)
@pytest.mark.parametrize("spoil", ["gone", "cut off", "another run's"])
def test_a_spoilt_list_is_not_believed(llama: Path, spoil: str) -> None:
    assert lorakit("train-llama", llama / "recipe.yaml").code == 0
    listed = llama / "runs/chats/data.json"
    alter_rows(llama)
    if spoil == "gone":
        listed.unlink()
    elif spoil == "cut off":
        listed.write_bytes(listed.read_bytes()[:100])
    else:
        listed.write_text(json.dumps({"train": [["a", "0" * 32]], "held_out": []}))
    told = lorakit("train-llama", llama / "recipe.yaml", "--resume").refused(3)
    assert re.search(f"{SINCE}$", told.error)


@pytest.mark.fault(54)
@pytest.mark.parametrize("family", ["llama", "sd"])
def test_a_base_of_the_same_weights_that_computes_otherwise(family: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(family)
    name, key, value = {
        "llama": ("config.json", "rms_norm_eps", 1e-3),
        "sd": ("scheduler/scheduler_config.json", "prediction_type", "v_prediction"),
    }[family]
    assert lorakit(f"train-{family}", folder / "recipe.yaml").code == 0
    path = folder / "base" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    again = lorakit(f"train-{family}", folder / "recipe.yaml", "--resume", "--allow").refused(4)
    assert again.error.endswith(f"changed since the run was started: the base's {name}")

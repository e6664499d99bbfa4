"""Faults 48, 49 and 54 by the command line: what a run that goes wrong, or on, never loses."""

import json
from pathlib import Path

import pytest

from tests.faults.harness import files, forked, lorakit, untouched

EVERY = ("--set", "train.checkpoint_every=1", "--set", "train.steps=4")
LEVEL = ("--set", "optimizer.name=adamw", "--set", "optimizer.warmup=0", "--set", "optimizer.schedule=constant")


@pytest.mark.fault(48)
@pytest.mark.parametrize("family", ["llama", "sd"])
def test_48_what_is_not_finite_is_never_saved(family: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(family)
    words = (f"train-{family}", folder / "recipe.yaml", *EVERY, *LEVEL, "--set", "optimizer.learning_rate=1e36")
    example = {"llama": "chats.jsonl:", "sd": ".png"}[family]
    forked(*words).refused(5, "step 2", "rank 0", example)
    (run,) = (folder / "runs").iterdir()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000001"]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1, "step 1 alone"
    before = files(run / "checkpoints")
    forked(*words, "--resume").refused(5, "step 2")
    assert files(run / "checkpoints") == before


@pytest.mark.fault(48)
@pytest.mark.parametrize("family", ["llama", "sd"])
def test_48_nor_is_an_adapter_that_overflowed(family: str, request: pytest.FixtureRequest) -> None:
    """Loss and gradient of step 1 are finite; what the update makes of the weights is not."""
    folder: Path = request.getfixturevalue(family)
    words = (f"train-{family}", folder / "recipe.yaml", *EVERY, *LEVEL, "--set", "optimizer.learning_rate=1e38")
    forked(*words).refused(5, "the adapter after step 1 is not finite", "lora_")
    assert not list(folder.glob("runs/*/checkpoints/step-*"))


@pytest.mark.fault(54)
def test_54_a_changed_recipe_is_refused_by_field(llama: Path) -> None:
    words = ("train-llama", llama / "recipe.yaml")
    assert lorakit(*words).code == 0
    safe = ("--set", "sample.every=3", "--set", "train.keep_checkpoints=9")
    with untouched(llama):
        told = lorakit(*words, "--resume", *safe).refused(2)
        assert all(name in told.err for name in ("sample.every", "train.keep_checkpoints", "--allow"))
        told = lorakit(*words, "--resume", "--set", "adapter.rank=8", "--set", "train.seed=1", "--allow").refused(2)
        assert all(name in told.err for name in ("adapter.rank", "train.seed"))
    assert lorakit(*words, "--resume", *safe, "--allow").code == 0


@pytest.mark.fault(54)
def test_54_a_run_of_a_level_rate_goes_on_for_longer(llama: Path) -> None:
    level = ("--set", "optimizer.schedule=constant", "--set", "optimizer.warmup=0")
    words = ("train-llama", llama / "recipe.yaml", *level)
    assert lorakit(*words).code == 0
    longer = lorakit(*words, "--resume", "--allow", "--set", "train.steps=4")
    assert longer.code == 0, longer.err
    rows = [json.loads(line) for line in (llama / "runs/chats/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


@pytest.mark.fault(49)
@pytest.mark.parametrize("family", ["llama", "sd"])
@pytest.mark.parametrize("megabytes", [10, 30, 60, 90, 120, 200])
def test_49_too_little_memory_is_told_as_that(family: str, megabytes: int, request: pytest.FixtureRequest) -> None:
    """Wherever it runs out: while libraries are mapped, a model is read, a thread is started, a step is computed."""
    folder: Path = request.getfixturevalue(family)
    told = forked(f"train-{family}", folder / "recipe.yaml", megabytes=megabytes)
    if told.code:
        told.refused(6, "memory")

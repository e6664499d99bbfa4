"""Faults 48 to 50, 52 and 54 by the command line: what a run that goes wrong, or on, never loses."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorakit.data.cache import default_folder
from lorakit.errors import is_out_of_memory
from lorakit.storage import manifest
from tests.faults.harness import Told, files, forked, lorakit, process, untouched

WEIGHTS = "adapter/adapter_model.safetensors"
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
def test_49_too_little_memory_is_told_as_that(family: str, request: pytest.FixtureRequest) -> None:
    """Wherever it runs out: while a model is read, a thread is started, a step is computed. The libraries are there
    already, since in some of them Python itself gets lost without memory."""
    folder: Path = request.getfixturevalue(family)
    words = (f"train-{family}", folder / "recipe.yaml", "--set")
    assert lorakit(*words, "output.name=warm").code == 0
    for megabytes in (10, 30, 60, 120):
        told = forked(*words, f"output.name=at{megabytes}", megabytes=megabytes)
        if told.code:
            told.refused(6, "memory")


def caused(error: Exception, cause: Exception, *, told: bool) -> Exception:
    """What a library makes of ``cause``, with or without a word of it."""
    try:
        try:
            raise cause
        except Exception:
            if told:
                raise error  # noqa: B904 (as diffusers does)
            raise error from None
    except Exception as made:
        return made


@pytest.mark.fault(49)
@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (ImportError("libarrow.so: failed to map segment from shared object"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("std::bad_alloc"), True),
        (caused(OSError("Unable to load weights"), MemoryError(), told=True), True),
        (caused(OSError("Unable to load weights"), MemoryError(), told=False), False),
        (ImportError("libarrow.so: no such file"), False),
    ],
)
def test_49_short_memory_by_any_name(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) is is_memory


@pytest.mark.fault(50)
def test_50_latents_that_go_away_end_the_run_in_words(sd: Path) -> None:
    """They are read ahead, in a thread: what it dies of is told by the run, whose checkpoints stay."""
    words = [sys.executable, "-m", "lorakit", "train-sd", str(sd / "recipe.yaml"), "--set", "train.steps=100000"]
    words += ["--set", "train.checkpoint_every=1"]
    run = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        while not list(sd.glob("runs/*/checkpoints/step-*")):
            assert run.poll() is None
            time.sleep(0.05)
        shutil.rmtree(default_folder() / "latents")
        _, err = run.communicate(timeout=120)
    finally:
        run.kill()
    Told(run.returncode, "", err).refused(3, "latents")
    (newest,) = sorted(sd.glob("runs/*/checkpoints/step-*"))[-1:]
    manifest.check_manifest(newest)


JUMPS = """
import itertools, time
real, jump = time.time, itertools.cycle([0, 3e8, -3e8])
time.time = lambda: real() + next(jump)
"""


@pytest.mark.fault(52)
def test_52_a_clock_that_jumps_changes_nothing(llama: Path) -> None:
    words = ("train-llama", llama / "recipe.yaml", *EVERY, "--set", "train.keep_checkpoints=9")
    for name, prelude in (("jumping", JUMPS), ("steady", "")):
        told = process(*words, "--set", f"output.name={name}", prelude=prelude)
        assert told.code == 0, told.err
    one, two = (load_file(llama / "runs" / name / WEIGHTS) for name in ("jumping", "steady"))
    assert all(torch.equal(one[key], two[key]) for key in one | two)
    folders = sorted((llama / "runs/jumping/checkpoints").glob("step-*"))
    assert [folder.name for folder in folders] == [f"step-00000{step}" for step in (1, 2, 3, 4)]
    for age, folder in enumerate(folders):
        os.utime(folder, (1e9 - age, 1e9 - age))
    (folders[-1] / "state.json").unlink()
    told = process(*words, "--set", "output.name=jumping", "--resume", prelude=JUMPS)
    assert told.code == 0, told.err
    assert "step-000004" in told.err, "the newest is damaged, and the one before it taken, whatever their times"
    again = load_file(llama / "runs/jumping" / WEIGHTS)
    assert all(torch.equal(again[key], two[key]) for key in again | two)

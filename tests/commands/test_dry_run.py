"""``--dry-run``, as a user calls it: the same plan each time, and from the second time on without the libraries."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lorakit.cli import main
from lorakit.training.launch import Session
from tests.faults.harness import process
from tests.tiny import tiny_llama, tiny_sd

HEAVY = ("accelerate", "bitsandbytes", "diffusers", "peft", "torch._dynamo", "transformers")
CODE = f"""
import sys
from lorakit.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print("imported:", *[name for name in {HEAVY} if name in sys.modules])
"""


def run(*words: object) -> tuple[list[str], list[str]]:
    """The lines that lorakit prints, but for the disk's, and which of ``HEAVY`` it imported."""
    command = [sys.executable, "-c", CODE, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *lines, imported = done.stdout.splitlines()
    return [line for line in lines if not line.startswith("disk: ")], imported.split()[1:]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is."}]
    (tmp_path / "chats.jsonl").write_text(9 * (json.dumps({"messages": turns}) + "\n"))
    recipe = {"base": {"model": str(tiny_llama(tmp_path / "base"))}, "adapter": {"rank": 4}}
    recipe["data"] = {"train": [{"path": "chats.jsonl"}], "max_tokens": 64, "held_out": 0}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path


@pytest.fixture
def sd(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / f"pictures/{number}.png")
        (tmp_path / f"pictures/{number}.txt").write_text("red")
    recipe = {"base": {"model": str(tiny_sd(tmp_path / "base"))}, "adapter": {"rank": 4, "text_encoder": True}}
    recipe["data"] = {"path": "pictures", "held_out": 0}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path


@pytest.mark.parametrize("words", [("--dry-run",), ()])
def test_a_batch_that_does_not_divide_is_refused_before_anything_is_written(
    words: tuple[str, ...], llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(llama)
    before = sorted(llama.rglob("*"))
    settings = ("train.batch_size=5", "compute.gradient_accumulation=2", "compute.device=cpu")
    arguments = ["lorakit", "train-llama", "recipe.yaml", *(w for s in settings for w in ("--set", s)), *words]
    monkeypatch.setattr(sys, "argv", arguments)
    closed: list[bool] = []
    close = Session.close
    monkeypatch.setattr(Session, "close", lambda self, *, failed: (closed.append(failed), close(self, failed=failed)))
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "5 examples do not divide into 2 micro-batches" in capsys.readouterr().err
    assert closed == ([] if words else [True])  # a watch that lives on may abort a rank as it ends
    assert sorted(llama.rglob("*")) == before


@pytest.mark.parametrize("family", ["llama", "sd"])
def test_the_second_dry_run_imports_no_library_of_models(
    family: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder: Path = request.getfixturevalue(family)
    monkeypatch.setenv("LORAKIT_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)
    words = (f"train-{family}", "recipe.yaml", "--dry-run", "--set", "compute.device=cpu")
    cold, imported = run(*words)
    assert "transformers" in imported  # so that the test can fail
    first, imported = run(*words)
    assert imported == []
    assert first == cold
    larger, imported = run(*words, "--set", "train.batch_size=3", "--set", "optimizer.learning_rate=1e-3")
    assert larger != first
    assert imported == []


@pytest.mark.parametrize("words", [("train-sd", "--dry-run"), ("data",), ("verify",), ("train-sd",)])
def test_warnings_are_told_alike_by_all_that_read_a_recipe(
    words: tuple[str, ...], sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sd)
    monkeypatch.setenv("LORAKIT_CACHE", str(sd / "cache"))
    (sd / "pictures").rename(sd / "10_\x1b[31mcat")
    (sd / "pictures").mkdir()
    (sd / "10_\x1b[31mcat").rename(sd / "pictures/10_\x1b[31mcat")
    done = process(*words, "recipe.yaml")
    assert done.code == 0, done.err
    warned = "lorakit: warning: 10_\\x1b[31mcat: the number is no repeat count"
    assert [line for line in done.err.splitlines() if "10_" in line and line.startswith(warned)], done.err
    assert "\x1b" not in done.err

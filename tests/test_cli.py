"""The command line as a user meets it: help, exit codes, one-line errors, and a README that names every command."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from lorakit.cli import app
from tests.faults.harness import lorakit

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_is_in_the_readme(command: str) -> None:
    done = lorakit(command, "--help")
    assert done.code == 0
    assert "Usage" in done.out
    assert f"lorakit {command}" in (ROOT / "README.md").read_text()


def test_the_face() -> None:
    assert {"train-sd", "train-llama", "merge", "generate"} <= set(COMMANDS)


def test_a_wrong_recipe_exits_2_with_each_error_on_a_line_and_no_traceback(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data:\n  path: pictures\ntrain:\n  stepps: 3\noptimizer:\n  learning_rate: -1\n")
    done = lorakit("train-sd", recipe)
    assert done.code == 2
    assert re.search(r"r\.yaml:4:\d+", done.err)
    assert "steps" in done.err
    assert re.search(r"r\.yaml:6:\d+", done.err)
    assert "Traceback" not in done.err


def test_no_command_shows_the_help_and_no_error() -> None:
    done = lorakit()
    assert done.code == 2
    assert "train-llama" in done.out
    assert done.err == ""


@pytest.mark.parametrize(("words", "told"), [(("init",), "sd, llama"), (("init", "foo"), "'foo' is not one of")])
def test_what_typer_says_is_one_plain_line(words: tuple[str, ...], told: str) -> None:
    done = lorakit(*words)
    assert done.code == 2
    first, *_ = done.err.splitlines()
    assert told in first
    assert "Value error" not in first
    assert "\\n" not in first


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = lorakit("--debug", "train-sd", tmp_path / "absent.yaml")
    assert done.code == 2
    assert "Traceback" in done.err


def test_a_missing_base_exits_4(tmp_path: Path) -> None:
    done = lorakit("generate", "--base", tmp_path / "absent", "--prompt", "x", "--out", tmp_path / "out")
    assert done.code == 4
    assert done.err.startswith("lorakit: error: ")
    assert not (tmp_path / "out").exists()


def test_init_writes_a_recipe_once(tmp_path: Path) -> None:
    assert lorakit("init", "llama", tmp_path / "r.yaml").code == 0
    assert lorakit("init", "llama", tmp_path / "r.yaml").code == 7


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_output_is_none(tmp_path: Path, closed: str) -> None:
    command = shlex.join([sys.executable, "-m", "lorakit", "init", "llama", str(tmp_path / "r.yaml")])
    done = subprocess.run(["sh", "-c", f"{command} {closed}"], capture_output=True, text=True, check=False)
    assert (done.returncode, (tmp_path / "r.yaml").is_file()) == (0, True), done.stderr

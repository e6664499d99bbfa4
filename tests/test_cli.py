"""The command line as a user meets it: help, exit codes, one-line errors, and a README that names every command."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from lorakit.cli import app

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]


def lorakit(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lorakit", *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_is_in_the_readme(command: str) -> None:
    done = lorakit(command, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout
    assert f"lorakit {command}" in (ROOT / "README.md").read_text()


def test_the_face() -> None:
    assert {"train-sd", "train-llama", "merge", "generate"} <= set(COMMANDS)


def test_a_wrong_recipe_exits_2_with_each_error_on_a_line_and_no_traceback(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data:\n  path: pictures\ntrain:\n  stepps: 3\noptimizer:\n  learning_rate: -1\n")
    done = lorakit("train-sd", recipe)
    assert done.returncode == 2
    assert re.search(r"r\.yaml:4:\d+", done.stderr)
    assert "steps" in done.stderr
    assert re.search(r"r\.yaml:6:\d+", done.stderr)
    assert "Traceback" not in done.stderr


def test_no_command_shows_the_help_and_no_error() -> None:
    done = lorakit()
    assert done.returncode == 2
    assert "train-llama" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(("words", "told"), [(("init",), "sd, llama"), (("init", "foo"), "'foo' is not one of")])
def test_what_typer_says_is_one_plain_line(words: tuple[str, ...], told: str) -> None:
    done = lorakit(*words)
    assert done.returncode == 2
    first, *_ = done.stderr.splitlines()
    assert told in first
    assert "Value error" not in first
    assert "\\n" not in first


def test_a_reader_that_has_gone_ends_it_with_a_code_of_the_list() -> None:
    command = [sys.executable, "-m", "lorakit", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        run.stdout.close()
        assert run.wait(120) == 6
        assert run.stderr is not None
        assert run.stderr.read() == ""


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = lorakit("--debug", "train-sd", tmp_path / "absent.yaml")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_a_missing_base_exits_4(tmp_path: Path) -> None:
    done = lorakit("generate", "--base", tmp_path / "absent", "--prompt", "x", "--out", tmp_path / "out")
    assert done.returncode == 4
    assert done.stderr.startswith("lorakit: error: ")
    assert not (tmp_path / "out").exists()


def test_init_writes_a_recipe_once(tmp_path: Path) -> None:
    assert lorakit("init", "llama", tmp_path / "r.yaml").returncode == 0
    assert lorakit("init", "llama", tmp_path / "r.yaml").returncode == 7


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_output_is_none(tmp_path: Path, closed: str) -> None:
    command = shlex.join([sys.executable, "-m", "lorakit", "init", "llama", str(tmp_path / "r.yaml")])
    done = subprocess.run(["sh", "-c", f"{command} {closed}"], capture_output=True, text=True, check=False)
    assert (done.returncode, (tmp_path / "r.yaml").is_file()) == (0, True), done.stderr


def test_output_in_ascii_escapes_what_it_lacks(tmp_path: Path) -> None:
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-m", "lorakit", "inspect", str(tmp_path / "\u23ce")]
    done = subprocess.run(words, capture_output=True, env=ascii_only, check=False)
    assert done.returncode == 4
    assert b"\\u23ce" in done.stderr or b"\\xe2" in done.stderr or b"\\udc" in done.stderr

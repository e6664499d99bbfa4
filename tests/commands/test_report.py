"""Errors as people read them: one line, what to do, the exit code; colour on a terminal only; no traceback unasked."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorakit.commands.report import guarded, tell
from lorakit.errors import ModelError
from lorakit.recipe.load import load
from lorakit.recipe.schema import SDRecipe
from tests.faults.harness import lorakit, process


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train-sd"], "Missing argument 'RECIPE'"),
        (["train-sd", "r.yaml", "--num-processes", "0"], "'--num-processes': must be greater than or equal to 1"),
        (["generate", "--base", "x", "--temperature", "warm"], "'--temperature': must be a valid number"),
        (["generate", "--base", "x", "--device", "tpu"], "'--device'"),
        (["--nope"], "--nope"),
        (["tarin-sd", "r.yaml"], "tarin-sd"),
        (["inspect", "a", "\x1b[31md"], "\\x1b[31md"),
    ],
)
def test_wrong_usage_is_one_line_and_where_to_read_on(words: list[str], told: str) -> None:
    done = lorakit(*words).refused(2, told)
    assert "--help" in done.err.splitlines()[1]


def raising(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("fail", "code", "told"),
    [
        (lambda: 1 // 0, 4, "ZeroDivisionError"),
        (lambda: load(Path("x"), SDRecipe, 3), 2, "TypeError"),  # type: ignore[arg-type]
        (lambda: bytearray(1 << 62), 6, "out of memory"),
        (lambda: raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")), 6, "out of memory"),
        (lambda: raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")), 6, "out of memory"),
        (lambda: Path("/dev/full").write_text("x"), 6, "No space left"),
        (
            lambda: raising(ModelError("two\nlines \x1b[31mred", where="a\tb")),
            4,
            r"a\tb: two\nlines \x1b",
        ),
    ],
)
def test_what_nobody_foresaw_is_one_line_with_a_code_of_the_list(fail, code, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text("data: {path: a}")
    assert guarded(fail) == code
    line, *_ = capsys.readouterr().err.splitlines()
    assert line.startswith("lorakit: error: ")
    assert told in line
    assert line.isprintable()


def test_debug_adds_the_traceback(tmp_path: Path) -> None:
    told = lorakit("--debug", "train-sd", tmp_path / "no.yaml")
    assert "Traceback" in told.err
    assert told.error


@pytest.mark.parametrize(
    ("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_colour_on_a_terminal_only(tmp_path: Path, environment: dict[str, str], coloured: bool) -> None:
    words = [sys.executable, "-m", "lorakit", "train-sd", str(tmp_path / "no.yaml")]
    plain = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"} | environment
    ours, theirs = pty.openpty()
    assert subprocess.run(words, stderr=theirs, env=plain, check=False).returncode == 2
    os.close(theirs)
    assert (b"\x1b[31m" in os.read(ours, 10_000)) is coloured
    os.close(ours)
    assert b"\x1b" not in subprocess.run(words, stderr=subprocess.PIPE, env=plain, check=False).stderr


def test_a_reader_that_has_gone_is_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "lorakit", "--help"], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (6, b"")


def test_an_error_is_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks write to one terminal, unbuffered: what is written in parts would mix."""
    parts: list[str] = []

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            parts.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stderr", Stream())
    assert tell(ModelError("it fails", where="a.bin", hint="mend it")) == 4
    assert parts == ["lorakit: error: a.bin: it fails\n  mend it\n"]


def test_text_that_the_streams_cannot_hold(tmp_path: Path) -> None:
    told = process("train-sd", tmp_path / "größe-½.yaml", env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    told.refused(2, "no such file")


@pytest.mark.parametrize(
    ("command", "code", "told"),
    [
        ("lorakit.cli.main(['doctor'])", 6, "cannot read or write: No space left on device"),
        ("sys.exit(guarded(lambda: (print('a'), raising())))", 4, "it fails"),
    ],
)
def test_what_stdout_does_not_take_leaves_the_exit_code(command: str, code: int, told: str) -> None:
    """Python would flush once more when it ends, and make 120 of it."""
    program = f"""
import sys
import lorakit.cli
from lorakit.commands.report import guarded, tell
from lorakit.errors import ModelError
def raising():
    raise ModelError("it fails")
{command}
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            check=False,
        )
    assert done.returncode == code, done.stderr
    assert "Exception ignored" not in done.stderr
    assert told in done.stderr

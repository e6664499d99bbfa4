"""A run stopped while it loads, as people stop one, and options that do not go together."""

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import lorakit, process


@contextmanager
def started(words: list[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process that does not outlive the block."""
    with subprocess.Popen(words, **options) as run:
        try:
            yield run
        finally:
            run.kill()


@pytest.mark.fault(44)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_44_a_signal_while_loading_is_one_line_with_the_way_on(sd: Path, number: signal.Signals, code: int) -> None:
    command = [sys.executable, "-m", "lorakit", "train-sd", str(sd / "recipe.yaml")]
    with started(command, stderr=subprocess.PIPE, text=True, env=os.environ) as run:
        while not (sd / "runs/colours/.lock").exists():
            assert run.poll() is None
            time.sleep(0.01)
        time.sleep(0.2)
        run.send_signal(number)
        _, err = run.communicate(timeout=60)
    assert run.returncode == code, err
    told = [line for line in err.splitlines() if not line.startswith("loading ")]
    assert told == [
        f"lorakit: error: {number.name}: stopped before the first step",
        f"  go on with: lorakit train-sd {sd / 'recipe.yaml'} --resume",
    ]
    assert lorakit("train-sd", sd / "recipe.yaml", "--resume").code == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_within_exec_has_the_same_exit_code(tmp_path: Path, number: signal.Signals, code: int) -> None:
    program = f"""
import sys
from lorakit.commands.report import guarded
from lorakit.training.stop import stopping_at_once
def command():
    with stopping_at_once("stopped", "again"):
        exec("import os\\nos.kill(os.getpid(), {int(number)})\\nwhile True: pass")
sys.exit(guarded(command))
"""
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run([sys.executable, "-m", "program"], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == code, done.stderr


HOOKS = {
    "ignored": """
class Last:
    def __del__(self):
        stop()
Last()
print("goes on", flush=True)
""",
    "made another": """
class Name:
    def __set_name__(self, owner, name):
        stop()
class Owner:
    field = Name()
""",
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_in_a_hook_of_pythons_is_not_lost(hook: str, number: signal.Signals, code: int) -> None:
    """What is raised there is ignored, or comes out as a RuntimeError."""
    program = f"""
import os, sys
from lorakit.commands.report import guarded
from lorakit.training.stop import stopping_at_once
def stop():
    os.kill(os.getpid(), {int(number)})
    for _ in range(10**6):
        pass
def command():
    with stopping_at_once("stopped", "again") as beginning:
        exec({HOOKS[hook]!r}, dict(stop=stop))
        beginning.check()
sys.exit(guarded(command))
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-2:] == [f"lorakit: error: {number.name}: stopped", "  again"]


def test_a_lost_connection_stops_a_run_like_sigterm(llama: Path) -> None:
    """A real terminal that goes: SIGHUP, and from then on nothing can be written to it."""
    keeper, terminal = pty.openpty()
    words = [sys.executable, "-m", "lorakit", "train-llama", str(llama / "recipe.yaml"), "--set", "train.steps=100000"]

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    with started(words, **streams, preexec_fn=take_terminal, env={**os.environ, "TERM": "xterm"}) as run:
        os.close(terminal)
        told = b""
        while b"steps/s" not in told:
            told += os.read(keeper, 4096)
        os.close(keeper)
        assert run.wait(60) == 75
    assert lorakit("train-llama", llama / "recipe.yaml", "--resume").refused(2, "train.steps")
    (state,) = (llama / "runs").glob("*/checkpoints/*/state.json")
    assert json.loads(state.read_text())["step"] > 0


def test_nohup_keeps_a_run_from_being_hung_up(llama: Path) -> None:
    words = [sys.executable, "-m", "lorakit", "train-llama", str(llama / "recipe.yaml"), "--set", "train.steps=12"]
    with started(["nohup", *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as run:
        while not any((llama / "runs").glob("*/metrics.jsonl")):
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(signal.SIGHUP)
        _, err = run.communicate(timeout=60)
    assert run.returncode == 0, err


def test_a_run_goes_on_when_nobody_reads_what_it_says(llama: Path) -> None:
    words = f"{sys.executable} -m lorakit train-llama {llama / 'recipe.yaml'}"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {words} 2>&1 >/dev/null | head -c 1"], check=False)
    assert done.returncode == 0
    assert list((llama / "runs").glob("*/adapter/adapter_model.safetensors"))


def test_a_signal_after_the_end_changes_nothing(llama: Path) -> None:
    after = f"import atexit, os\natexit.register(os.kill, os.getpid(), {int(signal.SIGTERM)})"
    assert process("train-llama", llama / "recipe.yaml", prelude=after).code == 0


def test_allow_is_for_a_run_that_is_resumed(sd: Path) -> None:
    lorakit("train-sd", sd / "recipe.yaml", "--allow").refused(2, "--allow: is for a run that is resumed")
    assert not (sd / "runs").exists()


def test_a_plan_leaves_stderr_empty(sd: Path) -> None:
    assert process("train-sd", sd / "recipe.yaml", "--dry-run").err == ""


def test_a_signal_before_the_first_picture(whole_sd: Path) -> None:
    words = ["generate", "--base", str(whole_sd), "--prompt", "a", "--steps", "500"]
    program = f"""
import os, threading
from lorakit import cli
from lorakit.families.sd import generate
load = generate.open_painter
def signalled(*words):
    os.kill(os.getpid(), {int(signal.SIGTERM)})
    return load(*words)
generate.open_painter = signalled
cli.main({words})
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 75
    assert done.stderr.splitlines() == ["lorakit: error: SIGTERM: stopped"]


def test_ranks_are_for_a_run_that_is_resumed(sd: Path) -> None:
    lorakit("verify", sd / "recipe.yaml", "--num-processes", "2").refused(2, "--num-processes: goes with --resume")

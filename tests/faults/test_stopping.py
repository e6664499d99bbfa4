"""A run stopped while it loads, as people stop one, and options that do not go together."""

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from lorakit.training.stop import StopSignals
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


def test_a_signal_while_the_terminal_is_written_to_holds_nothing_up() -> None:
    """Its handler runs in the main thread, which may have the terminal's lock, or half a line in its buffer."""
    terminal, said = threading.Lock(), threading.Event()

    def tell(_: str) -> None:
        if terminal.acquire(timeout=10):
            said.set()

    with StopSignals(tell, world=1) as signals:
        with terminal:
            os.kill(os.getpid(), signal.SIGTERM)
            while not signals.received:
                time.sleep(0.01)
        assert said.wait(5)


@contextmanager
def on_a_terminal(llama: Path) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    """A long run that has begun to train, and the two ends of its terminal."""
    keeper, terminal = pty.openpty()
    words = [sys.executable, "-m", "lorakit", "train-llama", str(llama / "recipe.yaml"), "--set", "train.steps=100000"]

    def take_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has these tests ignore, and what they start
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    with started(words, **streams, preexec_fn=take_terminal, env={**os.environ, "TERM": "xterm"}) as run:
        told = b""
        while b"step" not in told.partition(b"training")[2]:
            assert select.select([keeper], [], [], 60)[0], told
            told += os.read(keeper, 4096)
        yield run, keeper, terminal


def test_a_lost_connection_stops_a_run_like_sigterm(llama: Path) -> None:
    """A real terminal that goes: SIGHUP, and from then on nothing can be written to it."""
    with on_a_terminal(llama) as (run, keeper, terminal):
        os.close(terminal)
        os.close(keeper)
        assert run.wait(60) == 75
    assert lorakit("train-llama", llama / "recipe.yaml", "--resume").refused(2, "train.steps")
    (state,) = (llama / "runs").glob("*/checkpoints/*/state.json")
    assert json.loads(state.read_text())["step"] > 0


def test_a_held_terminal_holds_no_run_up(llama: Path) -> None:
    """Ctrl-S, or a connection that hangs: nothing that is written to it returns."""
    with on_a_terminal(llama) as (run, _, terminal):
        termios.tcflow(terminal, termios.TCOOFF)
        time.sleep(1)
        steps = (llama / "runs/chats/metrics.jsonl").read_text().count("\n")
        time.sleep(1)
        assert (llama / "runs/chats/metrics.jsonl").read_text().count("\n") > steps
        run.send_signal(signal.SIGTERM)
        while not list((llama / "runs").glob("*/checkpoints/step-*/state.json")):
            assert run.poll() in (None, 75)
            time.sleep(0.05)
        termios.tcflow(terminal, termios.TCOON)
        assert run.wait(60) == 75


def test_a_full_pipe_holds_no_run_up(llama: Path) -> None:
    """Whoever started it reads nothing of what it says."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with suppress(BlockingIOError):
        while True:
            os.write(write, bytes(4096))
    os.set_blocking(write, True)
    command = [sys.executable, "-m", "lorakit", "train-llama", str(llama / "recipe.yaml")]
    with started(command, stderr=write, stdout=subprocess.DEVNULL) as run:
        assert run.wait(120) == 0
    os.close(read)
    os.close(write)


IN_A_STEP = """
import time
from lorakit.commands.progress import Terminal
from lorakit.training.stop import StopSignals
with Terminal() as terminal, StopSignals(terminal.stage, world=1):
    terminal.start(9, 0)
    print("a step that takes long", flush=True)
    time.sleep(600)
"""


def test_a_second_ctrl_c_within_a_step_shows_the_cursor_again() -> None:
    keeper, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    with started([sys.executable, "-c", IN_A_STEP], stdout=terminal, stderr=terminal, env=environment) as run:
        told = b""
        for awaited in (b"a step that takes long", b"a second signal stops at once"):
            while awaited not in told:
                assert select.select([keeper], [], [], 60)[0], told
                told += os.read(keeper, 4096)
            run.send_signal(signal.SIGINT)
            time.sleep(1.2)
        assert run.wait(10) == 130
        while select.select([keeper], [], [], 0.2)[0]:
            told += os.read(keeper, 4096)
    os.close(keeper)
    os.close(terminal)
    assert told.rfind(b"\x1b[?25h") > told.rfind(b"\x1b[?25l") >= 0


WAITS = """
import os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from lorakit.commands.report import guarded
from lorakit.training.stop import stopping_at_once
def command():
    with stopping_at_once("stopped", "again"), ThreadPoolExecutor() as downloads:
        downloads.submit(time.sleep, 600)
        print("waits", flush=True)
        time.sleep(600)
sys.exit(guarded(command))
"""


def test_a_second_signal_ends_what_waits_for_its_threads(tmp_path: Path) -> None:
    """As the downloads of a base are."""
    (tmp_path / "program.py").write_text(WAITS)
    with started([sys.executable, "-m", "program"], cwd=tmp_path, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        run.stdout.readline()
        run.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        assert run.poll() is None
        run.send_signal(signal.SIGTERM)
        assert run.wait(10) == 130


EARLY = """
import os, signal, subprocess, sys, time
from lorakit.training.launch import _forwarded_signals
with _forwarded_signals() as received:
    os.kill(os.getpid(), signal.SIGTERM)
    while not received:
        time.sleep(0.01)
    rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(rank.wait(30))
"""


def test_a_signal_before_the_first_rank_reaches_it() -> None:
    done = subprocess.run([sys.executable, "-c", EARLY], check=False, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [str(-signal.SIGTERM)], done.stderr


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
    assert done.stderr.splitlines()[-1] == "lorakit: error: SIGTERM: stopped"  # bitsandbytes may say something first


def test_ranks_are_for_a_run_that_is_resumed(sd: Path) -> None:
    lorakit("verify", sd / "recipe.yaml", "--num-processes", "2").refused(2, "--num-processes: goes with --resume")

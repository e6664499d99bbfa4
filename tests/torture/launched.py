"""The command line as a user starts it: Python anew, and ``--num-processes 2`` through Accelerate's launcher."""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.torture.warm import QUIET, Done

ROOT = Path(__file__).parents[2]
MARK = "TORTURE_MARK"


class Launched:
    """As ``Warm.run``, on two ranks; ``hooks`` are those of rank 1."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run(self, words: Sequence[object], cwd: Path, hooks: Mapping[str, Any] | None = None) -> Done:
        return launch(self._folder, [*words, "--num-processes", "2"], cwd, {"1": hooks or {}})


def launch(folder: Path, words: Sequence[object], cwd: Path, hooks: Mapping[str, Any]) -> Done:
    """``python -m lorakit WORDS``. ``hooks`` by rank, "" for a run without ranks. Fails if a process is left behind."""
    cwd.mkdir(parents=True, exist_ok=True)
    path, mark = os.pathsep.join([str(Path(__file__).parent / "site"), str(ROOT)]), secrets.token_hex(8)
    environment = {**os.environ, **QUIET, "LORAKIT_CACHE": str(folder / "cache"), "PYTHONPATH": path}
    environment |= {"TORTURE_HOOKS": json.dumps(hooks), MARK: mark}
    command = [sys.executable, "-m", "lorakit", *map(str, words)]
    began = time.monotonic()
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if left := [process for process in psutil.process_iter() if _mark(process) == mark]:
        raise AssertionError(f"left behind: {left}")
    return Done(done.returncode, done.stderr, time.monotonic() - began)


def _mark(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except psutil.Error:
        return None

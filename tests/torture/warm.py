"""A warm process that forks children which run lorakit's command line: a start takes no time, the run is the real one.

Starting Python and importing torch takes seconds, and hundreds of killed runs need it twice each. ``Warm`` keeps one
process with everything imported and no thread started; each request makes it fork, and the child runs
``lorakit.cli.main`` with the words given, its output in files. The kill is a real SIGKILL at a real process.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

QUIET = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Done:
    """A child that has ended. ``code``: its exit code, or minus the signal that killed it."""

    code: int
    err: str
    seconds: float
    operations: list[list[str]] = field(default_factory=list)
    """With ``trace``: the operations on files below its root, in order (``tests.torture.trace``)."""


class Child:
    """A running child: ``pid``, and ``wait`` for its end."""

    def __init__(self, server: "Warm", pid: int, log: Path) -> None:
        self.pid, self._server, self._log, self._began = pid, server, log, time.monotonic()

    def kill(self, number: int) -> None:
        """Send a signal, unless the child has ended: the server leaves it unreaped until ``wait``."""
        os.kill(self.pid, number)

    def wait(self) -> Done:
        told = self._server.ask({"wait": self.pid})
        err = self._log.read_text(encoding="utf-8", errors="replace")
        return Done(told["code"], err, time.monotonic() - self._began, told.get("operations", []))


class Warm:
    """The client's side. ``folder`` takes the children's output."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "tests.torture.server"]
        environment = {**os.environ, **QUIET, "MPLCONFIGDIR": str(folder), "LORAKIT_CACHE": str(folder / "cache")}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(
        self, words: Sequence[object], cwd: Path, hooks: Mapping[str, Any] | None = None, **environment: str
    ) -> Child:
        """``lorakit WORDS`` in the folder ``cwd``. ``hooks``: see ``tests.torture.hooks``; ``trace`` traces it."""
        self._count += 1
        log = self._folder / f"{self._count}.log"
        cwd.mkdir(parents=True, exist_ok=True)
        request = {"words": [str(w) for w in words], "cwd": str(cwd), "hooks": dict(hooks or {}), "log": str(log)}
        request["env"] = environment
        return Child(self, self.ask(request)["pid"], log)

    def run(self, words: Sequence[object], cwd: Path, hooks: Mapping[str, Any] | None = None) -> Done:
        """The same, to its end."""
        return self.start(words, cwd, hooks).wait()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the warm process has died")
        told: dict[str, Any] = json.loads(answer)
        return told

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Pair:
    """As ``Warm.run``, on two ranks, given what ``accelerate launch`` gives to each; ``hooks`` are rank 1's."""

    def __init__(self, warm: Warm) -> None:
        self._warm = warm

    def run(self, words: Sequence[object], cwd: Path, hooks: Mapping[str, Any] | None = None) -> Done:
        """Both ranks to their end; what rank 0 came to."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        ranks = [
            self._warm.start(words, cwd, hooks if rank else None, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
            for rank in (0, 1)
        ]
        first, _ = (rank.wait() for rank in ranks)
        return first

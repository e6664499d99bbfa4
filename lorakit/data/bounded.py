"""A script in a process of its own, for what comes with a model and might take all time or memory.

The script bounds itself, reads a JSON document a line and answers each with one. The first line sets it up, and has no
answer.
"""

import json
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorakit.errors import DataError


class Bounded:
    """The process of ``script``: started at the first question, it ends with this object or with whatever holds it.

    ``seconds`` is the processor time of an answer, which the script is told as its argument.
    """

    def __init__(self, script: str, first: Callable[[], object], seconds: int) -> None:
        self.process: subprocess.Popen[str] | None = None
        self._script, self._first, self._seconds = script, first, seconds
        self._lock = threading.Lock()

    def ask(self, question: object) -> dict[str, Any] | None:
        """The answer; None when the process was stopped at its limits. The next question then starts another.

        Raises DataError when somebody else killed it, as the system does when memory runs out.
        """
        with self._lock:
            try:
                if self.process is None or self.process.poll() is not None:  # killed in the meantime
                    self.process = self._start()
                stdin, stdout = self.process.stdin, self.process.stdout
                assert stdin is not None
                assert stdout is not None
                stdin.write(json.dumps(question) + "\n")
                stdin.flush()
                answer: dict[str, Any] = json.loads(stdout.readline())
                return answer
            except (BrokenPipeError, ValueError) as error:  # ValueError: no answer, since the pipe is closed
                process, self.process = self.process, None
                if process is not None and process.wait() == -signal.SIGKILL:
                    reason = f"a helper process ({Path(self._script).stem}) was killed"
                    hint = "the system does that when memory runs out: free some, and start again"
                    raise DataError(reason, hint=hint) from error
                return None

    def _start(self) -> "subprocess.Popen[str]":
        """It is deaf to the signals that stop a run, which finishes its step first, and ends it then."""
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", self._script, str(self._seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)
        weakref.finalize(self, _end, process)
        assert process.stdin is not None
        process.stdin.write(json.dumps(self._first()) + "\n")
        return process


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # a question that was never read
                pipe.close()

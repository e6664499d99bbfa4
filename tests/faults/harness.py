"""The command line run as a user runs it, and what must be true of every refusal."""

import contextlib
import hashlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lorakit import cli
from tests.torture.refuse import refuse

CODES = frozenset({0, 2, 3, 4, 5, 6, 7, 8, 9, 75, 130})
"""Every exit code that a command may end with."""


@dataclass(frozen=True)
class Told:
    """What a command left: its exit code and its two streams."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that names the failure."""
        lines = [line for line in self.err.splitlines() if line.startswith("lorakit: error: ")]
        assert len(lines) == 1, self.err
        return lines[0]

    def refused(self, code: int, *words: str) -> "Told":
        """Assert a refusal with ``code``, told in one printable line that holds ``words``, without a traceback."""
        assert self.code == code, (self.code, self.err)
        assert "Traceback" not in self.err + self.out
        assert "nobody foresaw" not in self.err
        assert self.error.isprintable()
        missing = [word for word in words if word not in self.error]
        assert not missing, (missing, self.err)
        return self


def lorakit(*words: object) -> Told:
    """Run a command in this process."""
    out, err, environment = io.StringIO(), io.StringIO(), dict(os.environ)
    code: object = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    finally:
        os.environ.clear()
        os.environ.update(environment)
    assert isinstance(code, int)
    return Told(code, out.getvalue(), err.getvalue())


def process(*words: object, prelude: str = "", seconds: float = 180, env: Mapping[str, str] | None = None) -> Told:
    """Run a command in a process of its own, after ``prelude`` (Python); it must end within ``seconds``."""
    code = f"import sys\n{prelude}\nfrom lorakit.cli import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env={**os.environ, **(env or {})},
        errors="surrogateescape",
    )
    return Told(done.returncode, done.stdout, done.stderr)


def forked(
    *words: object,
    megabytes: int = 1500,
    seconds: float = 60,
    refused: Mapping[str, int] | None = None,
    nobody: bool = False,
) -> Told:
    """Run a command in a fork of this process, which saves its imports, with so much memory to add and time to take;
    the kernel refuses it the calls of ``refused`` (``tests/torture/refuse.py``), or, for ``nobody``, what root may."""
    with tempfile.TemporaryFile("w+") as told, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, which the child does not use
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20,) * 2)
                torch.set_num_threads(1)
                refuse(refused or {})
                if nobody and os.getuid() == 0:
                    os.setuid(65534)
                done = lorakit(*words)
                json.dump([done.code, done.out, done.err], told)
                told.flush()
            os._exit(0)
        end = time.monotonic() + seconds
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise AssertionError(f"{words} took over {seconds} seconds")
            time.sleep(0.01)
        told.seek(0)
        text = told.read()
        assert text, f"{words} died"
        return Told(*json.loads(text))


def files(root: Path) -> dict[str, str]:
    """Every file and link below ``root`` with a hash of its content, mode included; what is being written left out."""
    found = {}
    for below, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".tmp-")]
        for name in [*names, *folders]:
            path = Path(below) / name
            if path.is_symlink():
                found[str(path)] = f"-> {os.readlink(path)}"
            elif path.is_file() and not re.match(r"\.tmp-|\.lock$", name):
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() + oct(path.stat().st_mode)
    return found


@contextlib.contextmanager
def untouched(root: Path) -> Iterator[None]:
    """Nothing below ``root`` is changed, removed or added in the block."""
    before = files(root)
    yield
    after = files(root)
    assert {name: after.get(name) for name in before} == before
    assert set(after) == set(before), sorted(set(after) ^ set(before))

"""Run one contender in a process of its own and measure it from outside: wall time, first step, peak memory."""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
POLL, SAMPLE = 0.01, 0.25
"""Seconds between looks at the process, and between looks at the memory of its tree."""
KIBIBYTE = 1024


class Failed(Exception):
    """A process ended with an error; the message holds the end of what it printed."""


@dataclass(frozen=True)
class Ran:
    """A finished process."""

    seconds: float
    """From its start to its end."""
    first: float | None
    """From its start to the first whole line in the watched file; None without one."""
    peak: int
    """Bytes: the larger of the process's own greatest resident set (exact, from the kernel) and the greatest sum over
    it and its descendants (sampled). Pages of mapped files count."""


def run(command: Sequence[str], log: Path, *, watch: Path | None = None, env: Mapping[str, str] | None = None) -> Ran:
    """Run ``command`` in the repository's root, its output to ``log``. Raises Failed when it exits with another code
    than 0."""
    log.parent.mkdir(parents=True, exist_ok=True)
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", **(env or {})}
    began, first, peak, sampled = time.monotonic(), None, 0, float("-inf")
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=settings)
    try:
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            now = time.monotonic()
            if first is None and watch is not None and _has_line(watch):
                first = now - began
            if pid:
                break
            if now - sampled >= SAMPLE:
                peak, sampled = max(peak, tree_memory(process.pid)), now
            time.sleep(POLL)
    except BaseException:
        process.kill()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise Failed(f"{' '.join(command)}\nended with {process.returncode}:\n{_tail(log)}")
    return Ran(now - began, first, max(peak, usage.ru_maxrss * KIBIBYTE))


def tree_memory(pid: int) -> int:
    """Resident bytes of a process and all its descendants; those that end meanwhile count as nothing."""
    total = 0
    try:
        root = psutil.Process(pid)
        members = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for member in members:
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def _has_line(path: Path) -> bool:
    return path.exists() and b"\n" in path.read_bytes()[:4096]


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])

"""What a run shows on the terminal: a bar with step, loss, rate and time left; plain lines where there is none."""

import logging
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from statistics import median
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lorakit.errors import shown

SECONDS_BETWEEN_LINES = 15.0
PATIENCE = 100
"""Milliseconds that a slow terminal has to take a line."""


@contextmanager
def counted(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal while the block lasts; what it yields is told how many are done, and of how many."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class Lasting:
    """Stderr for a run that goes on when nobody reads it any more: a closed pipe, a lost connection, a terminal that is
    held or a full pipe, which would have each write wait. What nobody takes is dropped."""

    def __init__(self) -> None:
        self._file = sys.stderr

    def write(self, text: str) -> int:
        with suppress(OSError):
            if self._is_taken():
                self._file.write(text)
        return len(text)

    def _is_taken(self) -> bool:
        poll = select.poll()
        try:
            poll.register(self._file.fileno(), select.POLLOUT)
        except OSError:  # no file of the system's
            return True
        return bool(poll.poll(PATIENCE))

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Terminal:
    """The training loop's Progress, by rich on a terminal; else a line now and then, fit for a log file."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(file=cast(IO[str], Lasting()), quiet=quiet)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,  # else what others print went to the quiet console
        )
        self._last = self._spoken = time.monotonic()
        self._durations: deque[float] = deque(maxlen=21)
        self._total = 0
        self._average: float | None = None
        self.trained = False
        """Whether any update was made."""

    def __enter__(self) -> "Terminal":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, total: int, done: int) -> None:
        """Training begins at update ``done`` of ``total``."""
        self._last, self._total = time.monotonic(), total
        self._task = self._bar.add_task("training", total=total, completed=done, loss="-", rate="")

    def step(self, step: int, loss: float) -> None:
        """Update ``step`` was made; the loss shown is a moving average."""
        self.trained = True
        self._average = loss if self._average is None else 0.9 * self._average + 0.1 * loss
        now = time.monotonic()
        self._durations.append(now - self._last)
        self._last = now
        rate = 1 / max(median(self._durations), 1e-9)  # the median passes over pauses for evaluation and saving
        shown = f"{rate:.2f} steps/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.1f} s/step"
        self._bar.update(self._task, completed=step, loss=f"{self._average:.4f}", rate=shown)
        if not self.console.is_terminal and (now - self._spoken > SECONDS_BETWEEN_LINES or step == self._total):
            left = (self._total - step) / max(rate, 1e-9)
            self._line(f"step {step}/{self._total}  loss {self._average:.4f}  {shown}  {left / 60:.1f} min left")
            self._spoken = now

    def held_out(self, step: int, loss: float, metrics: Mapping[str, float]) -> None:
        """Print the held-out loss and what the family makes of it."""
        more = "".join(f"  {name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items())
        self._line(f"held-out loss after {step} steps: {loss:.4f}{more}")

    def stage(self, text: str) -> None:
        """Print what is done beside the steps."""
        self._line(text, style="dim")

    def _line(self, text: str, style: str = "") -> None:
        """In one line however long."""
        self.console.print(shown(text), style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def warnings_to(console: Console) -> Iterator[None]:
    """Print what ``logging.getLogger("lorakit")`` is told, a line each."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = f"lorakit: {record.levelname.lower()}: {shown(record.getMessage())}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    log, handler = logging.getLogger("lorakit"), Lines(logging.INFO)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)

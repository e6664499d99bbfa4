"""SIGTERM, SIGINT and SIGHUP as a wish that the loop fulfils after its step.

SIGHUP, which a lost connection sends, counts as SIGTERM; where nohup has it ignored, it stays so.
"""

import _thread
import atexit
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from lorakit.errors import INTERRUPTED, TERMINATED, Stopped

AT_ONCE = 1.0
"""Seconds after a signal in which others count as the same wish: what stops a whole tree of processes (systemd, a
logout, pkill) reaches a rank directly and once more by way of its launcher."""


def caught() -> list[signal.Signals]:
    """The signals that stop a run."""
    hung_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, *hung_up]


def show_cursor() -> None:
    """Undo what a bar that was cut off has hidden, if stderr is a terminal that takes it."""
    stderr = 2
    with suppress(OSError):
        if os.isatty(stderr) and select.select([], [stderr], [], 0)[1]:
            os.write(stderr, b"\x1b[?25h")


def end_at_once(code: int) -> NoReturn:
    """End this process with its threads, waiting for nothing."""
    show_cursor()
    os._exit(code)


class StopSignals:
    """While entered, the first signal is noted in ``received``; a second one, later than ``AT_ONCE``, ends the process.

    ``tell`` is called with a line for the user, in a thread of its own: the main thread may have been met while it held
    a lock that telling takes, such as the terminal's.

    One of many ranks is ended by its launcher alone: that may pass on late what the rank has had already, and sends
    SIGTERM to all as soon as one has ended. So there a second signal does nothing, and after an error, which the rank
    must not be kept from reporting, signals stay ignored. Outside the main thread, where Python allows no handlers,
    nothing is caught.
    """

    def __init__(self, tell: Callable[[str], None], *, world: int) -> None:
        self.received = 0
        self._since = 0.0
        self._tell = tell
        self._world = world
        self._earlier: dict[int, object] = {}

    @property
    def sigterm(self) -> bool:
        return self.received in (signal.SIGTERM, signal.SIGHUP)

    @property
    def sigint(self) -> bool:
        return self.received == signal.SIGINT

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in caught():
                self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        failed_with_others = kind is not None and self._world > 1
        for number, handler in self._earlier.items():
            signal.signal(number, signal.SIG_IGN if failed_with_others else handler)  # type: ignore[arg-type]

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
            told = "stopping after this step; a second signal stops at once, without saving"
            with suppress(RuntimeError):  # no more threads
                _thread.start_new_thread(self._tell, (told,))
        elif self._world == 1 and time.monotonic() - self._since > AT_ONCE:
            end_at_once(INTERRUPTED)


def stopped(*, by_sigterm: bool, step: int, resume_command: str) -> Stopped:
    """The error of a run that was stopped and has saved: exit code 75 for SIGTERM, 130 for SIGINT."""
    name, code = ("SIGTERM", TERMINATED) if by_sigterm else ("SIGINT", INTERRUPTED)
    return Stopped(f"{name}: stopped after step {step} and saved", exit_code=code, hint=f"go on with: {resume_command}")


class _Interrupted(KeyboardInterrupt):
    """No Exception, since libraries try imports and go on after any; no plain KeyboardInterrupt either, after which
    ``python -m`` ends by SIGINT, whatever the exit code, if it passed through an ``exec``, as many imports do."""


@dataclass
class Beginning:
    """What ``stopping_at_once`` yields. Once ``over``, there is nothing left to stop."""

    over: bool = False
    received: int = 0
    since: float = 0.0

    def check(self) -> None:
        """Stop if a signal came: Python ignores what is raised while it frees an object."""
        if self.received:
            raise _Interrupted(self.received)


@contextmanager
def stopping_at_once(told: str, hint: str) -> Iterator[Beginning]:
    """Around loading and what comes after it: a signal that comes before the work has nothing to wait for.

    It raises Stopped at once, with ``told`` and ``hint``; a second one, later than ``AT_ONCE``, ends the process, which
    may be waiting for threads that download. Meanwhile ``StopSignals`` may take its place. When all is
    ``over``, SIGTERM does nothing until the process ends; Ctrl-C ends a tracker that takes too long.
    """
    beginning = Beginning()

    def stop(number: int, _frame: FrameType | None) -> None:
        if beginning.over:
            return
        if beginning.received and time.monotonic() - beginning.since > AT_ONCE:
            end_at_once(INTERRUPTED)
        beginning.received, beginning.since = number, time.monotonic()
        raise _Interrupted(number)

    if threading.current_thread() is not threading.main_thread():
        yield beginning
        return
    earlier = {number: signal.signal(number, stop) for number in caught()}
    try:
        yield beginning
    except BaseException as error:  # Python makes another one of what is raised in some hooks
        interrupted = signal.SIGINT if isinstance(error, KeyboardInterrupt) else 0
        if not (beginning.received or interrupted):
            raise
        number = signal.Signals(beginning.received or interrupted)
        code = INTERRUPTED if number == signal.SIGINT else TERMINATED
        raise Stopped(f"{number.name}: {told}", exit_code=code, hint=hint) from None
    finally:
        for number, handler in earlier.items():
            if signal.getsignal(number) is not stop:
                continue
            if beginning.over and number != signal.SIGINT:  # Python forgets its handlers before it has ended
                atexit.register(signal.signal, number, signal.SIG_IGN)
            else:
                signal.signal(number, handler)


def die_with_parent() -> None:
    """Have Linux send SIGTERM to this process when its parent is killed, so that no orphan trains on."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)

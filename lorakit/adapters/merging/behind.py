"""What a merge leaves to other threads, a few blocks behind: hashing and writing, while the next block is computed."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

DEPTH = 2
"""Calls that may wait: blocks of memory that stay."""


class Behind:
    """Calls ``work`` with one block after another in a thread of its own, whose torch operations take one core: files
    and threads are what fills the others.

    What a call raises comes out of a later ``put``, or of ``wait``.
    """

    def __init__(self, work: Callable[[Any], object]) -> None:
        self._work, self._pool = work, ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self._late: deque[Future[object]] = deque()

    def put(self, block: Any) -> None:
        """Hand over a block, which nobody may write to from now on; waits while ``DEPTH`` others do."""
        if len(self._late) == DEPTH:
            self._late.popleft().result()
        self._late.append(self._pool.submit(self._work, block))

    def wait(self) -> None:
        """Until all calls are done."""
        while self._late:
            self._late.popleft().result()

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, *_: object) -> None:
        """Give up the calls that have not begun, and wait for the one that has."""
        self._pool.shutdown(cancel_futures=True)

"""A few jobs side by side; the first that fails stops the others."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")
WORKERS = 2
"""Jobs at a time: one waits for the disk while others go on, and what they read and write counts in memory."""


class Stopped(Exception):
    """Another job failed."""


class Crew:
    """Runs jobs in threads. A job calls ``go_on`` now and then with the bytes it has dealt with since."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        """``progress`` is told how many bytes of ``total`` are dealt with."""
        self._total, self._progress, self._done = total, progress, 0
        self._lock, self._stop = threading.Lock(), threading.Event()

    def go_on(self, size: int) -> None:
        """Raises Stopped when another job has failed or the program is interrupted."""
        if self._stop.is_set():
            raise Stopped
        with self._lock:
            self._done += size
            if self._progress is not None:
                self._progress(self._done, self._total)

    def run(self, jobs: Sequence[Callable[[Executor], T]]) -> list[T]:
        """The jobs' results in order; what the first one to fail raised. Each job is given threads, one a core, that
        it shares with the others for its arithmetic."""
        threads = torch.get_num_threads()
        with _threads(max(1, threads)) as cores, _threads(max(1, min(WORKERS, len(jobs)))) as pool:
            futures = [pool.submit(job, cores) for job in jobs]
            try:
                done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
                failed = [error for future in done if (error := future.exception()) is not None]
                if failed:
                    raise next((error for error in failed if not isinstance(error, Stopped)), failed[0])
                assert not waiting
                return [future.result() for future in futures]
            except BaseException:
                self._stop.set()
                for future in futures:
                    future.cancel()
                raise
            finally:
                torch.set_num_threads(threads)


def _threads(count: int) -> ThreadPoolExecutor:
    """Threads whose torch operations take one core each."""
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))

"""An adapter added to its base for good: W + scale * B A in float32, rounded once, written a few rows at a time.

The result is a folder that plain transformers or diffusers loads, or a single file in its original names. Tensors that
the adapter does not touch keep their bytes, shards and index keep their layout, configs and tokenizer come along.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lorakit.adapters.merge_plan import MergePlan, write_rest
from lorakit.adapters.stream import Tally, write_file
from lorakit.storage.atomic import new_file, new_folder
from lorakit.storage.bases import resolve

Progress = Callable[[int, int], None]
WORKERS = 4
"""Files in work at a time, where there are as many cores."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    out: Path
    modules: int
    """Weights that the adapters changed."""
    bytes: int
    """Size of the weight files written."""
    dtype: str
    """Of the changed weights: ``float16``, or several with commas."""
    rounding: float
    """Largest absolute difference between a float32 sum and what was written."""
    lost: float
    """Share of the change that rounding took: norm(written - sum) / norm(sum - W), over all changed weights."""


def merge(plan: MergePlan, *, overwrite: bool = False, progress: Progress | None = None) -> MergeReport:
    """Write what ``plan`` says; its ``out`` is absent or complete whatever happens.

    ``progress`` gets bytes written and bytes in all, from any thread.
    Raises ModelError when a sum is not finite in its dtype, ResourceError when the disk refuses.
    """
    single = "" in plan.files
    with new_file(plan.out, replace=overwrite) if single else _new_model(plan, overwrite) as place:
        tally = _write(plan, place, _counter(plan.size, progress))
        resolve(str(place))
    dtypes = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in tally.dtypes))
    return MergeReport(plan.out, plan.changed, plan.size, dtypes, tally.rounding, tally.lost)


@contextmanager
def _new_model(plan: MergePlan, overwrite: bool) -> Iterator[Path]:
    with new_folder(plan.out, manifest=False, replace=overwrite) as folder:
        write_rest(plan, folder)
        yield folder


def _counter(total: int, progress: Progress | None) -> Callable[[int], None]:
    lock, done = threading.Lock(), 0

    def written(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if progress is not None:
                progress(done, total)

    return written


class _Stopped(Exception):
    """Another file failed."""


def _write(plan: MergePlan, place: Path, written: Callable[[int], None]) -> Tally:
    """Write the weight files, several at a time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(WORKERS, cores, len(plan.files))
    stop = threading.Event()

    def count(size: int) -> None:
        if stop.is_set():
            raise _Stopped
        written(size)

    def write(name: str) -> Tally:
        tally = Tally()
        path = place / name if name else place
        path.parent.mkdir(exist_ok=True)
        write_file(path, plan.files[name], tally, count)
        return tally

    total, threads = Tally(), torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(max(1, cores // workers),)) as pool:
        jobs = [pool.submit(write, name) for name in plan.files]
        try:
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            for job in jobs:
                if job in done:
                    total.add(job.result())
        finally:
            stop.set()
            torch.set_num_threads(threads)
    return total

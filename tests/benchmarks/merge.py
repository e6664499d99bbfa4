"""Merging a Llama larger than half the memory: `lorakit merge`, `cp` of its base, and PEFT, from a cold cache each.

The base has Llama 3.1 8B's shapes and random weights in bfloat16, in shards of 5 GB; the adapter has rank 16 on every
linear layer of the blocks, so that 87 % of the bytes change. All is deleted afterwards: 33 GB at most are in use.
"""

import os
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.benchmarks import runner
from tests.benchmarks.report import table

CACHES = Path("/proc/sys/vm/drop_caches")
ROOM = 36_000_000_000
"""Bytes of disk: base and result, and something over."""


def cold(folder: Path) -> None:
    """Nothing below ``folder`` in the page cache; as root, nothing but what runs."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
    if os.access(CACHES, os.W_OK):
        CACHES.write_text("1\n")


def merge(work: Path, repeats: int, shape: Sequence[str] = ()) -> str:
    """Time and peak memory of each way as a Markdown section; whatever it wrote is deleted.

    ``shape``: options of ``prepare_merge``.
    """
    if not shape and shutil.disk_usage(work).free < ROOM:
        return f"Left out: it takes {ROOM / 1e9:.0f} GB of disk in {work} (--work names another place)."
    folder = work / "merge"
    base, adapter, out = folder / "base", folder / "adapter", folder / "out"
    try:
        prepare = [sys.executable, "-m", "tests.benchmarks.prepare_merge", str(folder), *shape]
        runner.run(prepare, work / "logs" / "prepare-merge.log")
        size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        ran: dict[str, list[runner.Ran]] = {}
        for _ in range(repeats):
            for name, command in _commands(base, adapter, out):
                cold(folder)
                try:
                    done = runner.run(command, work / "logs" / "merge.log")
                except runner.Failed as failure:
                    print(f"merge: {name} failed:\n{failure}", flush=True)
                    continue
                finally:
                    shutil.rmtree(out, ignore_errors=True)
                ran.setdefault(name, []).append(done)
                print(f"merge: {name}: {done.seconds:.1f} s, {done.peak / 1e9:.2f} GB", flush=True)
        return _section(size, repeats, ran)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _commands(base: Path, adapter: Path, out: Path) -> Iterator[tuple[str, list[str]]]:
    ours = [sys.executable, "-m", "lorakit", "merge", str(base), str(adapter), str(out)]
    yield "cp -r", ["cp", "-r", str(base), str(out)]
    yield "lorakit merge --no-verify", [*ours, "--no-verify"]
    yield "cp -r, then sync", ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(base), str(out)]
    yield "lorakit merge", ours
    peer = [sys.executable, "-m", "tests.benchmarks.peer_merge", str(base), str(adapter), str(out)]
    yield "PEFT merge_and_unload + save_pretrained", peer


def _section(size: int, repeats: int, ran: dict[str, list[runner.Ran]]) -> str:
    seconds = {name: statistics.median(one.seconds for one in runs) for name, runs in ran.items()}
    times = "one run" if repeats == 1 else f"{repeats} runs"
    copies = seconds["cp -r"], seconds["cp -r, then sync"]
    rows = [
        [
            name,
            f"{seconds[name]:.1f}",
            *(f"{seconds[name] / copy:.2f}" for copy in copies),
            f"{max(one.peak for one in runs) / 1e9:.2f}",
        ]
        for name, runs in ran.items()
    ]
    return "\n".join(
        [
            f"A Llama of {size / 2e9:.2f} B parameters in bfloat16 ({size / 1e9:.1f} GB in shards of 5 GB), LoRA r=16 "
            f"on every linear layer of its blocks. {times} each, in turn, from a cold cache; the process from start to "
            "end.",
            "",
            *table(("", "median, s", "times cp", "times cp and sync", "peak GB"), rows),
            "",
            "lorakit flushes what it wrote to the disk and hashes base and result in that time; `cp -r` returns with "
            "up to a fifth of the memory unwritten. With verification it recomputes every changed weight in float64, "
            "drops what it wrote from the cache and reads all of it back from the disk, in the order in which the "
            "result computes; base + adapter run beside it from the base's files, and their logits are compared.",
        ]
    )

"""``python -m tests.torture``: kill, resume, compare, count. ``make torture`` runs it.

What a case came to is noted in FOLDER/results.jsonl, so that it goes on where it was stopped.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

from tests.torture import runs, trace
from tests.torture.cases import FROZEN, STOPS
from tests.torture.hooks import TEETH
from tests.torture.killing import Bench, Tally
from tests.torture.launched import Launched, launch
from tests.torture.merging import MergeBench
from tests.torture.warm import Warm

Case = tuple[str, Callable[[], Tally]]


def random_kills(bench: Bench, count: int) -> Iterator[Case]:
    """SIGKILL at random moments, one to four a seed; and SIGTERM."""
    for seed in range(count):
        yield f"random {bench.family} {seed}", lambda seed=seed: bench.random_kills(seed)
    for seed in range(count // 2):
        yield f"SIGTERM {bench.family} {seed}", lambda seed=seed: bench.random_stop(seed)


def file_operations(bench: Bench, *, saving: bool) -> Iterator[Case]:
    """Each operation on files of a whole run, and each write half done: those of its saves, or all others."""
    if not trace.supported():
        return
    for number, (call, path, _) in enumerate(bench.operations()):
        for torn in (False, True) if call == "write" else (False,):
            name = f"{'saving' if saving else 'operation'} {bench.family} {number}{' torn' if torn else ''}"
            if ("checkpoints" in path) is saving:
                yield name, lambda n=number, t=torn: bench.kill_at(n, torn=t)


def failures(bench: Bench) -> Iterator[Case]:
    """Each operation on files of a whole run on a disk that breaks, and on one that is full; and a second signal in
    every save."""
    if not trace.supported():
        return
    for number, (_, path, _) in enumerate(bench.operations()):
        for error in ("EIO", "ENOSPC"):
            yield f"{error} {bench.family} {number}", lambda n=number, e=error: bench.fail_at(n, e)
        if "checkpoints" in path and number % 5 == 0:
            yield f"twice {bench.family} {number}", lambda n=number: bench.stop_twice(n)


def merges(bench: Bench, *, over: bool, out: str) -> Iterator[Case]:
    """Each operation on files of a merge: killed there, and a disk that breaks or is full."""
    if not trace.supported():
        return
    merging, how = MergeBench(bench, over=over, out=out), f"{out}{' over' if over else ''}"
    for number, (call, _, _) in enumerate(merging.operations()):
        for torn in (False, True) if call == "write" else (False,):
            name = f"merge {bench.family} {number}{' torn' if torn else ''} {how}"
            yield name, lambda n=number, t=torn: merging.kill_at(n, torn=t)
        for error in ("EIO", "ENOSPC"):
            yield f"merge {bench.family} {number} {error} {how}", lambda n=number, e=error: merging.fail_at(n, e)


def matrix(folder: Path, warm: Warm) -> Iterator[Case]:
    """Families x optimizers x ranks x stops."""
    for family, optimizer, ranks in itertools.product(runs.FAMILIES, ("adamw", "adamw_8bit"), (1, 2)):
        runner = warm if ranks == 1 else Launched(folder / "warm")
        name = f"{optimizer} {ranks}"
        bench = cache(partial(Bench, family, folder, runner, f"-{name}", f"optimizer.name={optimizer}"))
        for stop, when in (STOPS if ranks == 1 else STOPS | FROZEN).items():
            case = f"matrix {family} {name} {stop}"
            yield case, lambda b=bench, c=case, w=when: b().stopped(c, *w)


def verifications(folder: Path) -> Iterator[Case]:
    """``lorakit verify --resume``: says equal, on one rank and on two, and exits 9 where a safeguard is taken away."""

    def verify(family: str, hooks: dict[str, Any], *more: str) -> Tally:
        words = ["verify", runs.make(family, folder / family), "--resume", "--set", "train.steps=5000", *more]
        done = launch(folder / "warm", words, folder / "verify", hooks)
        if done.code == (9 if hooks else 0):
            return Tally(kills=1, resumed=1)
        return Tally(kills=1, divergent=1, told=[f"verify {family} {more}: exit {done.code}: {done.err[-2000:]}"])

    for family in runs.FAMILIES:
        yield f"verify {family}", partial(verify, family, {})
        yield f"verify {family} 2", partial(verify, family, {}, "--num-processes", "2")
    yield "verify llama without", partial(verify, "llama", {"": {"without": "rng"}})


class Journal:
    """The results so far, by case, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.results = {row["case"]: Tally(**row["tally"]) for row in map(json.loads, lines)}

    def add(self, case: str, tally: Tally) -> None:
        self.results[case] = tally
        with self.path.open("a") as file:
            file.write(json.dumps({"case": case, "tally": asdict(tally)}) + "\n")
        for line in tally.told:
            print(line, flush=True)

    def report(self) -> str:
        groups: dict[str, Tally] = {}
        for case, tally in self.results.items():
            group = " ".join(case.split()[:2])
            groups[group] = groups.get(group, Tally()) + tally
        lines = [f"{'':20}{'kills':>8}{'resumed':>9}{'divergent':>11}{'lost':>6}{'flips':>8}{'missed':>8}"]
        for name, t in [*groups.items(), ("all", sum(groups.values(), Tally()))]:
            lines.append(f"{name:20}{t.kills:8}{t.resumed:9}{t.divergent:11}{t.lost:6}{t.flips:8}{t.missed:8}")
        return "\n".join(lines)


def cases(folder: Path, warm: Warm, kills: int) -> Iterator[Case]:
    benches = [Bench(family, folder, warm) for family in runs.FAMILIES]
    for bench in benches:
        yield from random_kills(bench, kills)
    for bench in benches:
        yield from file_operations(bench, saving=True)
    for bench in benches:
        yield f"flips {bench.family}", bench.flipped
    yield from matrix(folder, warm)
    for bench, over in itertools.product(benches, (False, True)):
        yield from merges(bench, over=over, out="out")
    for over in (False, True):
        yield from merges(benches[-1], over=over, out="out.safetensors")
    yield from verifications(folder)
    for family, taken in itertools.product(runs.FAMILIES, sorted(TEETH.keys() - {"fsync", "manifest"})):
        bench = cache(partial(Bench, family, folder, warm, f"-{taken}", without=taken))
        yield f"teeth {family} {taken}", lambda b=bench: b().bitten()
    for bench in benches:
        yield from file_operations(bench, saving=False)
    for bench in benches:
        yield from failures(bench)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the runs and the results go")
    parser.add_argument("--kills", type=int, default=60, help="seeds of random kills a family, each one to four")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long; the same call goes on")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    given = parser.parse_args()
    folder: Path = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    journal, end = Journal(folder / "results.jsonl"), time.monotonic() + 60 * given.minutes
    with Warm(folder / "warm") as warm:
        for name, case in cases(folder, warm, given.kills):
            if name in journal.results or not name.startswith(given.only):
                continue
            if time.monotonic() > end:
                print("to be continued: call again")
                break
            journal.add(name, case())
    print(journal.report())
    total = sum(journal.results.values(), Tally())
    return 1 if total.divergent or total.lost or total.missed or total.resumed != total.kills else 0


if __name__ == "__main__":
    raise SystemExit(main())

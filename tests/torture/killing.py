"""Runs of the real command line that are killed, and what became of them."""

import errno
import random
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lorakit.errors import RankError
from lorakit.training.stop import AT_ONCE
from tests.torture import check, flips, runs
from tests.torture.cases import STOPS
from tests.torture.check import Reference
from tests.torture.warm import Done, Warm

EVERY = ["--set", "train.checkpoint_every=1", "--set", "train.keep_checkpoints=99"]


@dataclass
class Tally:
    """Figures of a case or of many: runs killed, runs resumed to a bit-equal end, and what went wrong.

    ``flips``: bits turned over in checkpoints; ``missed``: those that were not found.
    """

    kills: int = 0
    resumed: int = 0
    divergent: int = 0
    lost: int = 0
    flips: int = 0
    missed: int = 0
    told: list[str] = field(default_factory=list)

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(**{key: value + asdict(other)[key] for key, value in asdict(self).items()})


class Runner(Protocol):
    """``Warm``; for two ranks ``Pair`` or ``Launched``."""

    def run(self, words: Sequence[object], cwd: Path, hooks: Mapping[str, Any] | None = None) -> Done: ...


class Bench:
    """A family's recipe with its straight runs, made once below ``folder``, and what runs it.

    ``name`` tells benches apart that differ in ``changes`` (as --set takes them), ranks, or in ``without``: the
    safeguard that all runs go without (``hooks.TEETH``).
    """

    def __init__(
        self, family: str, folder: Path, runner: Runner, name: str = "", *changes: str, without: str = ""
    ) -> None:
        self.family, self.runner, self.without = family, runner, without
        recipe = runs.make(family, folder / family)
        self.command = [f"train-{family}", recipe, *(word for change in changes for word in ("--set", change))]
        self.work, straight, every = (folder / f"{family}{name}-{part}" for part in ("work", "straight", "every"))
        self.reference = Reference(straight / "runs/run", every / "runs/run")
        self.seconds = 0.0
        for cwd, more in ((straight, []), (every, EVERY)):
            if not (cwd / "whole").exists():
                shutil.rmtree(cwd, ignore_errors=True)
                done = self.finish(cwd, more)
                (cwd / "whole").write_text(str(done.seconds))
        self.seconds = float((straight / "whole").read_text())

    def finish(self, cwd: Path, more: Sequence[str] = (), hooks: dict[str, Any] | None = None) -> Done:
        done = self.runner.run([*self.command, *more], cwd, {"without": self.without, **(hooks or {})})
        if done.code != 0:
            raise AssertionError(f"exit {done.code}: {done.err}")
        return done

    def fresh(self, name: str) -> Path:
        """An empty working folder for one case."""
        cwd = self.work / name
        shutil.rmtree(cwd, ignore_errors=True)
        cwd.mkdir(parents=True)
        return cwd

    def start(self, cwd: Path, hooks: dict[str, Any] | None = None) -> Done:
        """Start or go on as a user would: with --resume, when there is a run to resume."""
        words = ["--resume"] if (cwd / "runs/run").is_dir() else []
        return self.runner.run([*self.command, *words], cwd, {"without": self.without, **(hooks or {})})

    def stopped(self, name: str, micro_batch: int, number: str) -> Tally:
        """One run (rank 1 of it, if there are two) that gets a signal as it takes a micro-batch, then resumed.

        SIGTERM: saved after the update that the micro-batch belongs to; else the last checkpoint is what counts.
        """
        tally, cwd, update = Tally(), self.fresh(name), micro_batch // runs.ACCUMULATION
        done = self.start(cwd, {"signal_at": (micro_batch, number)})
        killed = -9 if isinstance(self.runner, Warm) else RankError.exit_code
        expected = 75 if number == "SIGTERM" else killed
        if done.code != expected:
            tally.told.append(f"{name}: ended with {done.code} instead of {expected}: {done.err[-2000:]}")
            tally.lost += 1
            return tally
        self.after(name, cwd, tally)
        saved = update + 1 if number == "SIGTERM" else update - update % 2
        if max(check.steps(cwd / "runs/run"), default=0) != saved:
            tally.lost += 1
            tally.told.append(f"{name}: checkpoints {check.steps(cwd / 'runs/run')} where {saved} belongs")
        self.end(name, cwd, tally, 1)
        return tally

    def after(self, name: str, cwd: Path, tally: Tally, before: Sequence[int] = ()) -> None:
        """Look at what a kill has left; ``before``: the checkpoints that were there when the run started."""
        faults = check.broken(cwd / "runs/run", self.reference)
        tally.kills += 1
        tally.divergent += bool(faults)
        tally.told += [f"{name}: after the kill: {fault}" for fault in faults]
        if before and max(check.steps(cwd / "runs/run"), default=-1) < max(before):
            tally.lost += 1
            tally.told.append(f"{name}: checkpoints {list(before)} became {check.steps(cwd / 'runs/run')}")

    def end(self, name: str, cwd: Path, tally: Tally, kills: int) -> None:
        """Resume to the end; the ``kills`` before it count as resumed when the end is the straight run's."""
        done = self.start(cwd)
        if done.code != 0:
            tally.lost += kills
            tally.told.append(f"{name}: the resume ended with {done.code}: {done.err[-2000:]}")
            return
        faults = check.divergent(cwd / "runs/run", self.reference)
        tally.divergent += bool(faults)
        tally.told += [f"{name}: after the resume: {fault}" for fault in faults]
        tally.resumed += 0 if faults else kills
        if not faults:
            shutil.rmtree(cwd)

    def bitten(self) -> Tally:
        """Whether a resume is seen to differ where a safeguard was taken away; ``resumed`` counts those seen."""
        tally = self.stopped("teeth", *STOPS["killed in mid-accumulation"])
        seen = tally.divergent == 1 and tally.lost == 0 and all("after the resume" in line for line in tally.told)
        return Tally(kills=1, resumed=1) if seen else Tally(kills=1, divergent=1, told=[f"not seen: {tally}"])

    def flipped(self) -> Tally:
        """Bits of a stopped run's newest checkpoint turned over, one at a time."""
        cwd = self.fresh("flips")
        self.start(cwd, {"signal_at": (9, "SIGTERM")})
        tried, missed = flips.try_all(cwd / "runs/run", seed=0, count=500)
        return Tally(flips=tried, missed=len(missed), told=missed)

    def random_kills(self, seed: int) -> Tally:
        """One run killed one to four times at random moments, resumed each time, and finished."""
        draw, tally, name = random.Random(seed), Tally(), f"{self.family} seed {seed}"
        cwd = self.fresh(f"seed-{seed}")
        planned = draw.randint(1, 4)
        for _ in range(planned):
            before = check.steps(cwd / "runs/run")
            done = self.start(cwd, {"kill_after": draw.uniform(0.0, self.seconds)})
            if done.code != -9:
                if done.code != 0:
                    tally.lost += 1
                    tally.told.append(f"{name}: ended by itself with {done.code}: {done.err[-2000:]}")
                break
            self.after(name, cwd, tally, before)
        self.end(name, cwd, tally, tally.kills)
        return tally

    def random_stop(self, seed: int) -> Tally:
        """One run that gets SIGTERM at a random moment: it exits 75 (or 0, if it was all but over), and goes on."""
        tally, name = Tally(), f"{self.family} SIGTERM {seed}"
        cwd, after = self.fresh(f"term-{seed}"), random.Random(seed).uniform(0.05, self.seconds)
        done = self.start(cwd, {"kill_after": after, "number": signal.SIGTERM})
        not_begun = done.code == -signal.SIGTERM and not (cwd / "runs/run").exists()
        if done.code not in (0, 75) and not not_begun:
            tally.lost += 1
            tally.told.append(f"{name}: ended with {done.code}: {done.err[-2000:]}")
        self.after(name, cwd, tally)
        self.end(name, cwd, tally, 1)
        return tally

    def operations(self) -> list[tuple[str, str, str]]:
        """Every operation on files of a straight run, in order."""
        cwd = self.fresh("traced")
        traced = self.finish(cwd, hooks={"trace": {"root": str(cwd / "runs")}})
        return [(call, first, second) for call, first, second in traced.operations]

    def kill_at(self, number: int, *, torn: bool) -> Tally:
        """One run killed at its ``number``-th operation on files, then resumed to its end."""
        name, tally = f"{self.family} operation {number}{' torn' if torn else ''}", Tally()
        cwd = self.fresh(f"operation-{number}-{torn}")
        trace = {"root": str(cwd / "runs"), "kill_at": number, "torn": torn}
        done = self.start(cwd, {"trace": trace})
        if done.code != -9:
            raise AssertionError(f"{name}: not killed but ended with {done.code}: {done.err}")
        self.after(f"{name} {done.operations[-1]}", cwd, tally)
        self.end(name, cwd, tally, 1)
        return tally

    def fail_at(self, number: int, error: str) -> Tally:
        """One run whose ``number``-th operation on files fails, then resumed.

        ``error``: EIO, a disk that breaks once, or ENOSPC, one that is full from then on. It ends with exit 6 and says
        so in one line; or goes on to the straight run's end, where the operation does not matter.
        """
        name, tally = f"{self.family} operation {number} {error}", Tally()
        cwd = self.fresh(f"operation-{number}-{error}")
        trace = {"root": str(cwd / "runs"), "kill_at": number, "error": getattr(errno, error)}
        done = self.start(cwd, {"trace": trace})
        call = done.operations[number] if number < len(done.operations) else "never met"
        told = done.err.count("lorakit: error:") == 1 and "Traceback" not in done.err
        if done.code not in (0, 6) or (done.code == 6 and not told) or call == "never met":
            tally.lost += 1
            tally.told.append(f"{name} {call}: ended with {done.code}: {done.err[-2000:]}")
        if done.code == 0 and (faults := check.divergent(cwd / "runs/run", self.reference)):
            tally.divergent += 1
            tally.told += [f"{name} {call}: ended with 0: {fault}" for fault in faults]
        self.after(f"{name} {call}", cwd, tally)
        self.end(f"{name} {call}", cwd, tally, 1)
        return tally

    def stop_twice(self, number: int) -> Tally:
        """One run that gets SIGINT at its ``number``-th operation on files and again, later, at the next: it ends at
        once, and is resumed."""
        name, tally = f"{self.family} operation {number} twice", Tally()
        cwd = self.fresh(f"operation-{number}-twice")
        trace = {"root": str(cwd / "runs"), "kill_at": number, "number": signal.SIGINT, "again": 1.2 * AT_ONCE}
        done = self.start(cwd, {"trace": trace})
        if done.code != 130 or "and saved" in done.err:  # by one signal it would be saved
            tally.lost += 1
            tally.told.append(f"{name}: ended with {done.code}: {done.err[-2000:]}")
        self.after(f"{name} {done.operations[-1]}", cwd, tally)
        self.end(name, cwd, tally, 1)
        return tally

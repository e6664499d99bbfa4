"""``lorakit merge`` killed, or failing, at every operation on files: OUT is absent or complete, base and adapter are
untouched."""

import errno
import shutil
from pathlib import Path
from typing import Any

from tests.torture import check
from tests.torture.killing import Bench, Tally
from tests.torture.warm import Done


class MergeBench:
    """Merges of a trained bench's adapter into its base: ``out``, a folder or a single file. ``over``: it exists, and
    ``--overwrite`` is given."""

    def __init__(self, bench: Bench, *, over: bool, out: str = "out") -> None:
        self.bench, self.over, self.out = bench, over, out
        self.base = Path(bench.command[1]).parent / "base"
        self.adapter = bench.reference.straight
        self.expected = self._merged("expected", "1.0")
        self.old = self._merged("old", "0.5")

    def _merged(self, name: str, scale: str) -> Path:
        cwd = self.bench.fresh(f"merge-{name}-{self.out}")
        done = self.bench.runner.run(["merge", self.base, self.adapter, self.out, "--scale", scale], cwd)
        assert done.code == 0, done.err
        return cwd / self.out

    def _command(self) -> list[object]:
        return ["merge", self.base, self.adapter, self.out, *(["--overwrite"] if self.over else [])]

    def _fresh(self, name: str) -> Path:
        cwd = self.bench.fresh(f"merge-{name}-{self.over}-{self.out}")
        if self.over:
            shutil.copytree(self.old.parent, cwd, dirs_exist_ok=True)
        return cwd

    def operations(self) -> list[tuple[str, str, str]]:
        cwd = self._fresh("traced")
        done = self.bench.runner.run(self._command(), cwd, {"trace": {"root": str(cwd)}})
        assert done.code == 0, done.err
        return [(call, first, second) for call, first, second in done.operations]

    def kill_at(self, number: int, *, torn: bool) -> Tally:
        """A merge killed at its ``number``-th operation, then made again."""
        done, tally = self._broken(number, f"{number}{' torn' if torn else ''}", {"torn": torn})
        assert done.code == -9, done.err
        return tally

    def fail_at(self, number: int, error: str) -> Tally:
        """A merge whose ``number``-th operation fails, then made again (``Bench.fail_at``)."""
        done, tally = self._broken(number, f"{number} {error}", {"error": getattr(errno, error)})
        told = done.err.count("lorakit: error:") == 1 and "Traceback" not in done.err
        if done.code not in (0, 6) or (done.code == 6 and not told):
            tally.lost += 1
            tally.told.append(f"merge {self.bench.family} {number} {error}: ended with {done.code}: {done.err[-2000:]}")
        return tally

    def _broken(self, number: int, name: str, how: dict[str, Any]) -> tuple[Done, Tally]:
        name = f"merge {self.bench.family} operation {name}{' over' if self.over else ''} {self.out}"
        tally, cwd = Tally(kills=1), self._fresh(name)
        before, there = self._inputs(), {path.name for path in self.expected.parent.iterdir()}
        done = self.bench.runner.run(self._command(), cwd, {"trace": {"root": str(cwd), "kill_at": number, **how}})
        faults = [f"{p.name} is left over" for p in cwd.iterdir() if p.name not in there and p.name[:5] != ".tmp-"]
        if (cwd / self.out).exists():
            faults += min((self._differing(cwd, whole) for whole in self._whole()), key=len)
        elif self.over:
            faults.append("the model that was there is gone")
        if self._inputs() != before:
            faults.append("the base or the adapter has changed")
        if done.code == 0 and (not (cwd / self.out).exists() or self._differing(cwd, self.expected)):
            faults.append("ended with 0, and OUT is not what was merged")
        if number >= len(done.operations):
            faults.append("the operation never came")
        tally.lost += bool(faults)
        again = self.bench.runner.run([*self._command(), *([] if self.over else ["--overwrite"])], cwd)
        if again.code != 0 or self._differing(cwd, self.expected):
            tally.divergent += 1
            faults.append(f"merged again: exit {again.code} {again.err[-500:]}")
        if left := [path.name for path in cwd.iterdir() if path.name not in there]:
            faults.append(f"not swept: {left}")
        tally.resumed += not faults
        call = done.operations[number] if number < len(done.operations) else "never met"
        tally.told = [f"{name} {call}: {fault}" for fault in faults]
        shutil.rmtree(cwd)
        return done, tally

    def _differing(self, cwd: Path, whole: Path) -> list[str]:
        if whole.is_dir():
            return check.differing_files(cwd / self.out, whole)
        return [] if (cwd / self.out).read_bytes() == whole.read_bytes() else [self.out]

    def _whole(self) -> list[Path]:
        return [self.expected, self.old] if self.over else [self.expected]

    def _inputs(self) -> dict[str, tuple[int, int]]:
        files = [p for f in (self.base, self.adapter / "adapter") for p in f.rglob("*") if p.is_file()]
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in files}

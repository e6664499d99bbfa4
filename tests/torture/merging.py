"""``lorakit merge`` killed at every operation on files: OUT is absent or complete, base and adapter are untouched."""

import shutil
from pathlib import Path

from tests.torture import check
from tests.torture.killing import Bench, Tally


class MergeBench:
    """Merges of a trained bench's adapter into its base. ``over``: OUT exists, and ``--overwrite`` is given."""

    def __init__(self, bench: Bench, *, over: bool) -> None:
        self.bench, self.over = bench, over
        self.base = Path(bench.command[1]).parent / "base"
        self.adapter = bench.reference.straight
        self.expected = self._merged("expected", "1.0")
        self.old = self._merged("old", "0.5")

    def _merged(self, name: str, scale: str) -> Path:
        cwd = self.bench.fresh(f"merge-{name}")
        done = self.bench.runner.run(["merge", self.base, self.adapter, "out", "--scale", scale], cwd)
        assert done.code == 0, done.err
        return cwd / "out"

    def _command(self) -> list[object]:
        return ["merge", self.base, self.adapter, "out", *(["--overwrite"] if self.over else [])]

    def _fresh(self, name: str) -> Path:
        cwd = self.bench.fresh(f"merge-{name}-{self.over}")
        if self.over:
            shutil.copytree(self.old, cwd / "out")
        return cwd

    def operations(self) -> list[tuple[str, str, str]]:
        cwd = self._fresh("traced")
        done = self.bench.runner.run(self._command(), cwd, {"trace": {"root": str(cwd)}})
        assert done.code == 0, done.err
        return [(call, first, second) for call, first, second in done.operations]

    def kill_at(self, number: int, *, torn: bool) -> Tally:
        """A merge killed at its ``number``-th operation, then made again."""
        name = f"merge {self.bench.family} operation {number}{' torn' if torn else ''}{' over' if self.over else ''}"
        tally, cwd = Tally(kills=1), self._fresh(f"{number}-{torn}")
        before = self._inputs()
        trace = {"root": str(cwd), "kill_at": number, "torn": torn}
        done = self.bench.runner.run(self._command(), cwd, {"trace": trace})
        assert done.code == -9, done.err
        faults = [f"{p.name} is left over" for p in cwd.iterdir() if p.name != "out" and not p.name.startswith(".tmp-")]
        if (cwd / "out").exists():
            faults += min((check.differing_files(cwd / "out", whole) for whole in self._whole()), key=len)
        elif self.over:
            faults.append("the model that was there is gone")
        if self._inputs() != before:
            faults.append("the base or the adapter has changed")
        tally.lost += bool(faults)
        again = self.bench.runner.run([*self._command(), *([] if self.over else ["--overwrite"])], cwd)
        if again.code != 0 or check.differing_files(cwd / "out", self.expected):
            tally.divergent += 1
            faults.append(f"merged again: exit {again.code} {again.err[-500:]}")
        if left := [path.name for path in cwd.iterdir() if path.name != "out"]:
            faults.append(f"not swept: {left}")
        tally.resumed += not faults
        tally.told = [f"{name} {done.operations[-1]}: {fault}" for fault in faults]
        shutil.rmtree(cwd)
        return tally

    def _whole(self) -> list[Path]:
        return [self.expected, self.old] if self.over else [self.expected]

    def _inputs(self) -> dict[str, tuple[int, int]]:
        files = [p for f in (self.base, self.adapter / "adapter") for p in f.rglob("*") if p.is_file()]
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in files}

"""Who takes part in a comparison, how each is started, and what is read from what it leaves behind."""

import json
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks import machine, runner
from tests.benchmarks.plan import Plan

OURS = "lorakit"
TRL = ("padded", "padding-free", "packed")


@dataclass(frozen=True)
class Step:
    seconds: float
    loss: float
    work: int
    """Real tokens, or pictures."""


@dataclass(frozen=True)
class Run:
    """One contender trained once."""

    steps: tuple[Step, ...]
    ran: runner.Ran

    def rate(self, warmup: int) -> float:
        """Work a second after the first ``warmup`` steps."""
        timed = self.steps[warmup:]
        return sum(step.work for step in timed) / sum(step.seconds for step in timed)


@dataclass(frozen=True)
class Contender:
    """``module`` is None for lorakit itself, which is started as a user would."""

    name: str
    module: str | None = None
    variant: str = ""
    same_batches: bool = True
    """Whether it trains on the comparison's batches in order, so that losses can be set side by side."""


def contenders(what: str, python: str, script: Path | None) -> Iterator[Contender]:
    """lorakit first, then the peers that ``python`` can run; prints a line for one that it cannot."""
    yield Contender(OURS)
    if what.startswith("sd"):
        yield Contender("diffusers + PEFT loop", "peer_diffusers")
        if what == "sd15" and script is not None:
            yield Contender(f"diffusers' {script.name}", "peer_script", str(script.resolve()), same_batches=False)
        return
    yield Contender("transformers + PEFT loop", "peer_peft")
    if what == "llama" and machine.has_package(python, "litgpt"):
        yield Contender("litgpt", "peer_litgpt")
    if not machine.has_package(python, "trl"):
        print(f"TRL is left out: {python} has no trl (pip install trl, or --peer-python)", flush=True)
        return
    for variant in TRL if what == "llama" else TRL[:1]:  # full rows leave nothing to pad or pack
        yield Contender(f"TRL + PEFT, {variant}", "peer_trl", variant, same_batches=variant != "packed")


def train(contender: Contender, work: Path, python: str, number: int) -> Run:
    """Train once in a process of its own. Raises runner.Failed when it fails."""
    plan = Plan.load(work)
    if contender.module is None:
        out = work / "runs" / f"ours-{number}"
        shutil.rmtree(out, ignore_errors=True)
        command = lorakit(plan.family, Path(plan.recipe), f"output.name={out.name}")
    else:
        out = work / "peers" / f"{contender.module}-{Path(contender.variant).stem or 'plain'}-{number}"
        shutil.rmtree(out, ignore_errors=True)
        command = [python, "-m", f"tests.benchmarks.{contender.module}", str(work), str(out)]
        command += ["--variant", contender.variant] if contender.variant else []
    watch = out / "metrics.jsonl"
    ran = runner.run(
        command, work / "logs" / f"{out.name}.log", watch=watch, env={"LORAKIT_CACHE": str(work.parent / "cache")}
    )
    return Run(tuple(_steps(watch, plan, ours=contender.module is None)), ran)


def lorakit(family: str, recipe: Path, *overrides: str) -> list[str]:
    """The command a user types, by this interpreter."""
    return [
        *(sys.executable, "-m", "lorakit", f"train-{family}", str(recipe)),
        *(word for override in overrides for word in ("--set", override)),
    ]


def _steps(path: Path, plan: Plan, *, ours: bool) -> Iterator[Step]:
    """The steps in a metrics.jsonl. lorakit's ``seconds`` is the sum over the run so far, a peer's is one step's."""
    before = 0.0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    if len(rows) != plan.steps:
        raise runner.Failed(f"{path} has {len(rows)} steps of {plan.steps}")
    for row, work in zip(rows, plan.work, strict=True):
        yield Step(row["seconds"] - before, row["loss"], work if ours else row["work"])
        before = row["seconds"] if ours else 0.0


@dataclass(frozen=True)
class Result:
    """A contender's medians over its runs."""

    contender: Contender
    rate: float
    step_seconds: float
    peak: float
    """Bytes."""
    first: float
    """Seconds from the start of the process to the end of the first step."""
    first_loss: float
    last_loss: float
    """Mean over the last quarter of the steps."""
    losses: tuple[float, ...]
    """Of the first run, a step."""
    spread: float
    """Largest rate over smallest, minus 1."""


def result(contender: Contender, runs: Sequence[Run], warmup: int) -> Result:
    """Medians over ``runs``."""
    rates = [run.rate(warmup) for run in runs]
    losses = tuple(step.loss for step in runs[0].steps)
    return Result(
        contender=contender,
        rate=statistics.median(rates),
        step_seconds=statistics.median(step.seconds for run in runs for step in run.steps[warmup:]),
        peak=statistics.median(run.ran.peak for run in runs),
        first=statistics.median(run.ran.first or run.ran.seconds for run in runs),
        first_loss=losses[0],
        last_loss=statistics.mean(losses[-max(1, len(losses) // 4) :]),
        losses=losses,
        spread=max(rates) / min(rates) - 1,
    )

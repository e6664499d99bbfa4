"""How long a user waits: `lorakit --help`, `--dry-run`, and the first step of a run, cached or not."""

import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks import runner
from tests.benchmarks.compare import Settings
from tests.benchmarks.contenders import lorakit
from tests.benchmarks.report import table

FAMILIES = ("llama", "sd")


def start(settings: Settings) -> str:
    """The waiting times as a Markdown table: medians over the repeats."""
    rows = []
    for name, time in _times(settings).items():
        seconds = [time(number) for number in range(settings.repeats)]
        rows.append([name, f"{statistics.median(seconds):.2f}", f"{min(seconds):.2f}", f"{max(seconds):.2f}"])
        print(f"start: {name}: {rows[-1][1]} s", flush=True)
    lines = table(("", "median, s", "least, s", "most, s"), rows)
    return "\n".join(["Seconds from the start of the process.", "", *lines])


def _times(settings: Settings) -> dict[str, Callable[[int], float]]:
    work = (settings.work / "start").resolve()

    def whole(*words: str) -> Callable[[int], float]:
        command = [sys.executable, "-m", "lorakit", *words]
        return lambda _: runner.run(command, work / "start.log", env=_cache(work)).seconds

    times = {"lorakit --help": whole("--help")}
    for family in FAMILIES:
        folder = work / family
        words = [family, str(folder), "--steps", "2", "--warmup", "0", "--precision", settings.precision]
        words += ["--batch", str(settings.batch_of(family)), "--max-tokens", str(settings.max_tokens)]
        runner.run([sys.executable, "-m", "tests.benchmarks.prepare", *words], work / "prepare.log", env=_cache(work))
        recipe = folder / "recipe.yaml"
        times[f"train-{family} --dry-run"] = whole(f"train-{family}", str(recipe), "--dry-run")
        if family == "sd":
            times["train-sd, first step, nothing cached"] = _first(family, recipe, work, cached=False)
        times[f"train-{family}, first step{', cached' if family == 'sd' else ''}"] = _first(family, recipe, work)
    return times


def _first(family: str, recipe: Path, work: Path, *, cached: bool = True) -> Callable[[int], float]:
    def time(number: int) -> float:
        out = recipe.parent / "runs" / f"start-{number}"
        shutil.rmtree(out, ignore_errors=True)
        if not cached:
            shutil.rmtree(work / "cache", ignore_errors=True)
        command = lorakit(family, recipe, f"output.name={out.name}")
        ran = runner.run(command, work / f"{family}.log", watch=out / "metrics.jsonl", env=_cache(work))
        return ran.first or ran.seconds

    return time


def _cache(work: Path) -> dict[str, str]:
    return {"LORAKIT_CACHE": str(work / "cache")}

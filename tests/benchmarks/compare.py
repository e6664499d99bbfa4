"""One comparison: prepare, train all contenders in turn A B A B, and lay the medians side by side."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks import runner
from tests.benchmarks.contenders import Contender, Result, Run, contenders, result, train
from tests.benchmarks.plan import Plan
from tests.benchmarks.report import table

TITLES = {
    "llama1b": "train-llama: a Llama of 1.2 B parameters' shape (random weights), rows full of plain text, LoRA r=16 "
    "on q, k, v, o",
    "llama": "train-llama: SmolLM2-135M, LoRA r=16 on q, k, v, o",
    "sd": "train-sd: builtin:mini-sd at 64 px, LoRA r=4 on attention",
    "sd15": "train-sd: a UNet of SD 1.5's shape (random weights) at 512 px, LoRA r=4 on attention",
}
GIGA = 1e9
UNPACKED = " All load the base from the same folder."
CACHED = " lorakit finds latents and text states in its cache; `start` says what filling it takes."


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    steps: int
    warmup: int
    repeats: int
    batch: int | None
    max_tokens: int
    precision: str
    python: str
    work: Path
    script: Path | None = None
    """diffusers' train_text_to_image_lora.py."""

    def batch_of(self, what: str) -> int:
        """The batch asked for, or the comparison's own."""
        return (
            self.batch if self.batch is not None else {"llama": 8, "llama1b": 1, "ranks": 2, "sd": 16, "sd15": 1}[what]
        )


def compare(what: str, settings: Settings, roof: dict[str, float]) -> str:
    """Run one comparison and give its table as Markdown. A peer that fails is named and left out; lorakit may not."""
    work = (settings.work / what).resolve()
    plan = prepare(what, work, settings, settings.batch_of(what))
    taking_part = list(contenders(what, settings.python, settings.script))
    runs: dict[Contender, list[Run]] = {contender: [] for contender in taking_part}
    for number in range(settings.repeats):
        for contender in list(runs):
            try:
                run = train(contender, work, settings.python, number)
            except runner.Failed as failure:
                if contender.module is None:
                    raise
                print(f"{contender.name} is left out:\n{failure}", flush=True)
                del runs[contender]
                continue
            runs[contender].append(run)
            print(f"{what}: {contender.name}, run {number + 1}: {run.rate(plan.warmup):.4g} a second", flush=True)
    shutil.rmtree(work / "llama1b", ignore_errors=True)
    results = [result(contender, made, plan.warmup) for contender, made in runs.items()]
    return _section(what, settings, plan, results, roof)


def prepare(what: str, work: Path, settings: Settings, batch: int) -> Plan:
    """Fill the folder ``work`` for one comparison."""
    words = [what, str(work), "--steps", str(settings.steps + settings.warmup), "--warmup", str(settings.warmup)]
    words += ["--precision", settings.precision, "--batch", str(batch), "--max-tokens", str(settings.max_tokens)]
    print(f"{what}: preparing", flush=True)
    cache = settings.work.resolve() / "cache"
    command = [sys.executable, "-m", "tests.benchmarks.prepare", *words]
    runner.run(command, settings.work / "logs" / f"prepare-{what}.log", env={"LORAKIT_CACHE": str(cache)})
    return Plan.load(work)


def measure_roof(settings: Settings) -> dict[str, float]:
    """FLOP/s of a matmul in fp32 and bf16, in a process of its own."""
    out = settings.work.resolve() / "roof.json"
    command = [sys.executable, "-m", "tests.benchmarks.roof", str(out)]
    runner.run(command, settings.work / "logs" / "roof.log")
    roof: dict[str, float] = json.loads(out.read_text())
    return roof


def _section(what: str, settings: Settings, plan: Plan, results: Sequence[Result], roof: dict[str, float]) -> str:
    unit = "real tokens/s" if plan.family == "llama" else "pictures/s"
    work = sum(plan.work[plan.warmup :])
    operations = sum(plan.flops[plan.warmup :]) / work
    size = f"{work / settings.steps:.0f} real tokens a step on average, " if plan.family == "llama" else ""
    runs = "one run each" if settings.repeats == 1 else f"{settings.repeats} runs each"
    spread = f"Runs of one contender differ by up to {max(one.spread for one in results):.0%}. " * (
        settings.repeats > 1
    )
    lines = [
        f"{TITLES[what]}; batch {plan.batch}, {size}{plan.precision}, torch AdamW, {settings.steps} timed steps after "
        f"{plan.warmup}, {runs}, in turn. Medians.",
        "",
        *table(
            (
                *("", unit, "s/step", "lorakit is faster", "peak GiB", "lorakit's share of it"),
                *("share of the roof", "first step, s", "loss: first, last quarter", "largest loss difference"),
            ),
            [_row(one, results[0], operations / roof[plan.precision]) for one in results],
        ),
        "",
        f"{spread}Roof: a matmul reaches {roof['fp32'] / GIGA:.0f} GFLOP/s in fp32, {roof['bf16'] / GIGA:.0f} in bf16; "
        f"the work needs {operations / GIGA:.2f} GFLOP a {'token' if plan.family == 'llama' else 'picture'} "
        "(tests/benchmarks/flops.py says what counts). The loss difference is the largest over all steps where both "
        "train on the same batches." + (CACHED if plan.family == "sd" else UNPACKED),
    ]
    return "\n".join(lines)


def _row(one: Result, ours: Result, seconds_at_the_roof: float) -> list[str]:
    peer = one is not ours
    differences = [abs(a - b) for a, b in zip(one.losses, ours.losses, strict=True)]
    return [
        one.contender.name,
        f"{one.rate:.4g}",
        f"{one.step_seconds:.3g}",
        f"{ours.rate / one.rate:.2f} x" if peer else "",
        f"{one.peak / 2**30:.2f}",
        f"{ours.peak / one.peak:.2f}" if peer else "",
        f"{one.rate * seconds_at_the_roof:.0%}",
        f"{one.first:.1f}",
        f"{one.first_loss:.4f}, {one.last_loss:.4f}",
        f"{max(differences):.1e}" if peer and one.contender.same_batches else "",
    ]

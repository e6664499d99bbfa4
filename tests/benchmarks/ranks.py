"""What a second rank costs: two ranks of one run against two runs that know nothing of each other.

Every row is filled to its last token, so that each rank and each run does the same work in each step. Each process has
one thread.
"""

import json
import shutil
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.benchmarks import runner
from tests.benchmarks.compare import Settings, prepare
from tests.benchmarks.contenders import lorakit
from tests.benchmarks.plan import Plan
from tests.benchmarks.report import table

RANKS = 2


def ranks(settings: Settings) -> str:
    """Both rates as a Markdown section."""
    batch = settings.batch_of("ranks")
    whole, half = ((settings.work / "ranks" / name).resolve() for name in ("whole", "half"))
    plans = {whole: prepare("ranks", whole, settings, batch), half: prepare("ranks", half, settings, batch // RANKS)}
    rates: dict[str, list[float]] = {"one run of two ranks": [], "two runs": []}
    for number in range(settings.repeats):
        together = _train(whole, plans[whole], f"ranks-{number}", settings, "--num-processes", str(RANKS))
        rates["one run of two ranks"].append(together)
        names = [f"alone-{number}-{run}" for run in range(RANKS)]
        with ThreadPoolExecutor(RANKS) as pool:
            alone = pool.map(lambda name: _train(half, plans[half], name, settings), names)
        rates["two runs"].append(sum(alone))
        print(f"ranks: {together:.4g} and {rates['two runs'][-1]:.4g} tokens a second", flush=True)
    medians = {name: statistics.median(made) for name, made in rates.items()}
    cost = 1 - medians["one run of two ranks"] / medians["two runs"]
    rows = [
        [name, f"{rate:.4g}", f"{min(rates[name]):.4g} to {max(rates[name]):.4g}"] for name, rate in medians.items()
    ]
    timed = f"{settings.steps} timed steps after {settings.warmup}, {settings.repeats} runs each, in turn. Medians."
    said = (
        f"train-llama on SmolLM2-135M, {plans[whole].precision}, rows of {settings.max_tokens} tokens, "
        f"{batch // RANKS} a rank and step, a thread each; {timed} Accelerate and the exchange "
        f"of gradients cost {cost:.1%}."
    )
    return "\n".join([said, "", *table(("", "tokens/s, both processes", "of all runs"), rows)])


def _train(work: Path, plan: Plan, name: str, settings: Settings, *words: str) -> float:
    """Tokens a second after the warm-up."""
    out = work / "runs" / name
    shutil.rmtree(out, ignore_errors=True)
    env = {"LORAKIT_CACHE": str(settings.work.resolve() / "cache"), "OMP_NUM_THREADS": "1"}
    command = [*lorakit("llama", Path(plan.recipe), f"output.name={name}"), *words]
    runner.run(command, settings.work / "logs" / f"{name}.log", env=env)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in rows if "loss" in row]
    began = seconds[plan.warmup - 1] if plan.warmup else 0.0
    return sum(plan.work[plan.warmup :]) / (seconds[-1] - began)

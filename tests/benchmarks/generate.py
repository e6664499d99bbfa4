"""Generation: `lorakit generate`'s own code beside transformers + PEFT and the diffusers pipeline, A B A B."""

import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import runner
from tests.benchmarks.compare import Settings
from tests.benchmarks.report import table

FAMILIES: dict[str, tuple[str, dict[str, str]]] = {
    "llama": ("answer", {"lorakit": "lorakit", "transformers": "transformers generate + PEFT"}),
    "sd": ("draw", {"lorakit": "lorakit", "fp32": "diffusers pipeline, fp32", "bf16": "diffusers pipeline, bf16"}),
}
UNITS = {"llama": "tokens/s", "sd": "pictures/s"}


def generate(settings: Settings) -> str:
    """Both families' rates as a Markdown section."""
    work = (settings.work / "generate").resolve()
    shutil.rmtree(work, ignore_errors=True)
    print("generate: preparing", flush=True)
    prepare = [sys.executable, "-m", "tests.benchmarks.prepare_generate", str(work), "--precision", settings.precision]
    runner.run(prepare, settings.work / "logs" / "prepare-generate.log")
    lines = []
    for family in FAMILIES:
        made = _run(family, work / family, settings)
        task = json.loads((work / family / "task.json").read_text())
        lines += [*_said(family, task, made), "", *_table(family, made), ""]
    return "\n".join(lines).rstrip()


def _run(family: str, work: Path, settings: Settings) -> dict[str, list[dict[str, Any]]]:
    module, contenders = FAMILIES[family]
    made: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for number in range(settings.repeats):
        for name in contenders:
            out = work / f"{name}-{number}.json"
            python = sys.executable if name == "lorakit" else settings.python
            command = [python, "-m", f"tests.benchmarks.{module}", str(work), str(out), name]
            ran = runner.run(command, settings.work / "logs" / f"{out.stem}.log")
            result = {**json.loads(out.read_text()), "peak": ran.peak}
            made[name].append(result)
            print(f"generate: {contenders[name]}: {result['one']:.3g}, {result['together']:.3g}", flush=True)
    return made


def _said(family: str, task: dict[str, Any], made: dict[str, list[dict[str, Any]]]) -> Sequence[str]:
    runs = len(made["lorakit"])
    if family == "sd":
        return [
            f"SD: builtin:mini-sd at 64 px, LoRA r=4 on attention, {task['steps']} steps of its own scheduler, "
            f"guidance {task['guidance']}, {len(task['prompts'])} prompts; {runs} runs each, in turn. Medians."
        ]
    ours, theirs = (made[name][0]["answers"] for name in ("lorakit", "transformers"))
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    how = f"LoRA r=16 on q, k, v, o, not merged, {task['precision']}, greedy, {len(ours)} prompts"
    return [
        f"LLaMA: SmolLM2-135M, {how}, at most {task['tokens']} tokens each; {runs} runs each, in turn. Medians. "
        f"{same} of {len(ours)} answers are the same to the last word."
    ]


def _table(family: str, made: dict[str, list[dict[str, Any]]]) -> Sequence[str]:
    def median(name: str, key: str) -> float:
        return statistics.median(result[key] for result in made[name])

    rows = []
    for name, title in FAMILIES[family][1].items():
        row = [title]
        for key in ("one", "together"):
            rate, peer = median(name, key), name != "lorakit"
            row += [f"{rate:.4g}", f"{median('lorakit', key) / rate:.2f} x" if peer else ""]
        rows.append([*row, f"{median(name, 'peak') / 2**30:.2f}"])
    unit = UNITS[family]
    head = ("", f"{unit}, one at a time", "lorakit is faster", f"{unit}, all together", "lorakit is faster", "peak GiB")
    return table(head, rows)

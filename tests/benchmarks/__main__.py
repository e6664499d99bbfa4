"""Time lorakit beside what its users would pick instead.

    python -m tests.benchmarks [llama|llama1b|sd|sd15|generate|ranks|start|merge|all] [--steps N] [--write]

All contenders train in turn (A B A B), each in a process of its own, on the same model, data, batches, precision,
adapter, optimizer and learning rate.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.benchmarks import machine, report
from tests.benchmarks.compare import Settings, compare, measure_roof
from tests.benchmarks.generate import generate
from tests.benchmarks.merge import merge
from tests.benchmarks.ranks import ranks
from tests.benchmarks.start import start

KINDS = ("llama", "llama1b", "sd", "generate", "ranks", "start", "merge")
"""What ``all`` runs; sd15 takes long and is asked for by name."""
COMPARED = ("llama", "llama1b", "sd", "sd15")
"""Those that train beside peers."""
LONG = ("llama1b", "sd15")
"""A step of these takes seconds to a minute: 4 steps after 1, two runs each, unless told otherwise."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", default="all", choices=(*KINDS, "sd15", "all"))
    parser.add_argument("--steps", type=int, help="timed steps a run; default: 20, 4 of large models")
    parser.add_argument("--warmup", type=int, help="steps before them that are not timed; default: 3, 1")
    parser.add_argument("--repeats", type=int, help="runs of each contender; default: 3, 2")
    parser.add_argument("--batch", type=int, help="default: 8 chats, 16 pictures, 1 of large models")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest chat")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="for all contenders")
    parser.add_argument("--peer-python", default=sys.executable, help="the interpreter that has the peers installed")
    parser.add_argument("--diffusers-script", type=Path, help="sd15: diffusers' train_text_to_image_lora.py takes part")
    parser.add_argument("--work", type=Path, help="keep models, logs and runs here; default: a temporary folder")
    parser.add_argument("--write", action="store_true", help=f"put the figures into {report.RESULTS.name}")
    return parser.parse_args()


def run(given: argparse.Namespace, work: Path) -> None:
    """Run what was asked for, print it, and write it when asked."""
    kinds = KINDS if given.what == "all" else (given.what,)
    print(f"{machine.describe()}\n{machine.versions(given.peer_python)}", flush=True)
    roof = measure_roof(settings_of(given, kinds[0], work)) if set(kinds) & set(COMPARED) else {}
    others = {"generate": generate, "ranks": ranks, "start": start, "merge": lambda s: merge(work.resolve(), s.repeats)}
    for kind in kinds:
        settings = settings_of(given, kind, work)
        body = others[kind](settings) if kind in others else compare(kind, settings, roof)
        print(f"\n{body}\n", flush=True)
        if given.write:
            name = kind if given.batch is None else f"{kind}, batch {given.batch}"
            report.write(name, body, given.peer_python)


def settings_of(given: argparse.Namespace, kind: str, work: Path) -> Settings:
    """What was asked for, and the kind's own number of steps and runs where nothing was."""
    own = {"steps": 4, "warmup": 1, "repeats": 2} if kind in LONG else {"steps": 20, "warmup": 3, "repeats": 3}
    numbers = {name: value if getattr(given, name) is None else getattr(given, name) for name, value in own.items()}
    return Settings(
        **numbers,
        batch=given.batch,
        max_tokens=given.max_tokens,
        precision=given.precision,
        python=given.peer_python,
        work=work,
        script=given.diffusers_script,
    )


def main() -> None:
    given = arguments()
    if given.work is not None:
        given.work.mkdir(parents=True, exist_ok=True)
        run(given, given.work)
        return
    with tempfile.TemporaryDirectory(prefix="lorakit-bench-") as folder:
        run(given, Path(folder))


if __name__ == "__main__":
    main()

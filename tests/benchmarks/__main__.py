"""Time lorakit beside what its users would pick instead.

    python -m tests.benchmarks [llama|sd|sd15|start|merge|all] [--steps N] [--repeats N] [--write]

All contenders train in turn (A B A B), each in a process of its own, on the same model, data, batches, precision,
adapter, optimizer and learning rate.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.benchmarks import machine, report
from tests.benchmarks.compare import Settings, compare, measure_roof
from tests.benchmarks.merge import merge
from tests.benchmarks.start import start

KINDS = ("llama", "sd", "start", "merge")
"""What ``all`` runs; sd15 takes long and is asked for by name."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", default="all", choices=(*KINDS, "sd15", "all"))
    parser.add_argument("--steps", type=int, default=20, help="timed steps a run")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them that are not timed")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each contender")
    parser.add_argument("--batch", type=int, help="default: 8 chats, 16 pictures, 1 at 512 px")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest chat")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="for all contenders")
    parser.add_argument("--peer-python", default=sys.executable, help="the interpreter that has the peers installed")
    parser.add_argument("--work", type=Path, help="keep models, logs and runs here; default: a temporary folder")
    parser.add_argument("--write", action="store_true", help=f"put the figures into {report.RESULTS.name}")
    return parser.parse_args()


def run(given: argparse.Namespace, work: Path) -> None:
    """Run what was asked for, print it, and write it when asked."""
    settings = Settings(
        given.steps,
        given.warmup,
        given.repeats,
        given.batch,
        given.max_tokens,
        given.precision,
        given.peer_python,
        work,
    )
    kinds = KINDS if given.what == "all" else (given.what,)
    print(f"{machine.describe()}\n{machine.versions(given.peer_python)}", flush=True)
    roof = measure_roof(settings) if set(kinds) - {"start", "merge"} else {}
    bodies = {"start": lambda: start(settings), "merge": lambda: merge(work.resolve(), given.repeats)}
    for kind in kinds:
        body = bodies[kind]() if kind in bodies else compare(kind, settings, roof)
        print(f"\n{body}\n", flush=True)
        if given.write:
            name = kind if given.batch is None else f"{kind}, batch {given.batch}"
            report.write(name, body, given.peer_python)


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

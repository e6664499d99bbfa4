"""`lorakit verify --resume`: proof, on the user's own recipe and machine, that a stopped run goes on bit for bit.

The recipe is trained twice for a few steps by ``python -m lorakit`` itself, in folders of their own beside the output:
once without a stop, once stopped by SIGTERM and resumed. Of the recipe changes only where it writes, that every step
has a checkpoint, and that there are no samples or trackers: schedule, data and dropout are those of the real run.
"""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import TERMINATED, CheckpointError, RankError, RecipeError
from lorakit.recipe import load
from lorakit.recipe.schema import LlamaRecipe, SDRecipe
from lorakit.storage import atomic, manifest
from lorakit.storage.runs import RunFolder
from lorakit.training.stop import caught, die_with_parent, stopping_at_once

STEPS_BEFORE, STEPS_AFTER = 2, 3
_FILES = {"adapter": "adapter.safetensors", "optimizer": "optimizer.safetensors"}
_MEASURED = ("step", "loss", "learning_rate", "grad_norm")
"""What metrics.jsonl says of a step itself; the rest are times."""


@dataclass(frozen=True)
class _Run:
    """One of the two runs: its folder, the command that trains it, and what raises when a signal came meanwhile."""

    folder: RunFolder
    command: Sequence[str]
    check: Callable[[], None]

    def train(self, *more: str, until: Callable[[], bool]) -> bool:
        """Train in processes of their own until ``until`` holds, then stop by SIGTERM; whether that was in time.

        SystemExit with its code, after what it told, when the run ends in any other way.
        """
        with tempfile.TemporaryFile() as told:
            # A signal that came while the process starts would lose it.
            heard = signal.pthread_sigmask(signal.SIG_BLOCK, caught())

            def alone() -> None:
                signal.pthread_sigmask(signal.SIG_SETMASK, heard)
                die_with_parent()

            command = [*self.command, *more]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=told, preexec_fn=alone)
            try:
                signal.pthread_sigmask(signal.SIG_SETMASK, heard)
                while process.poll() is None and not until():
                    self.check()
                    time.sleep(0.01)
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                code = process.wait()
            if code not in (0, TERMINATED):
                told.seek(0)
                sys.stderr.write(told.read().decode(errors="replace"))
                if code < 0:
                    raise RankError(f"the run was ended by {signal.strsignal(-code)}", where=str(self.folder.root))
                raise SystemExit(code)
        return code == TERMINATED

    def last_step(self) -> int:
        return max((step for step, _ in self.folder.saved()), default=0)

    def hashes(self, step: int) -> dict[str, str]:
        """SHA-256 of adapter, optimizer state and metrics after ``step`` updates; CheckpointError if not whole."""
        checkpoint = self.folder.checkpoint(step)
        manifest.check_manifest(checkpoint)
        found = {what: manifest.sha256(checkpoint / name) for what, name in _FILES.items()}
        rows = [json.loads(line) for line in self.folder.metrics.read_text(encoding="utf-8").splitlines()]
        steps = [[row.get(key) for key in _MEASURED] for row in rows if "loss" in row and row["step"] <= step]
        return {**found, "metrics": hashlib.sha256(json.dumps(steps).encode()).hexdigest()}


def run(path: Path, overrides: list[str], processes: int) -> None:
    """Stop and resume a few steps of the recipe, and compare with as many steps that were never stopped.

    CheckpointError when they differ; the folder with both runs then stays until the next time. What the runs
    themselves fail with is their own exit code.
    """
    recipe = load.load_any(path, overrides)
    recipe.output.folder.mkdir(parents=True, exist_ok=True)
    with (
        stopping_at_once("stopped", "nothing is left of both runs") as beginning,
        atomic.beside(recipe.output.folder / "verify", folder=True) as work,
    ):
        straight, stopped = (
            _Run(RunFolder(work / name), _command(recipe, path, overrides, processes, work / name), beginning.check)
            for name in ("straight", "stopped")
        )
        at, step = _train(straight, stopped, "" if recipe.train.epochs is None else "--set train.epochs=null ")
        expected, found = straight.hashes(step), stopped.hashes(step)
    print(f"stopped by SIGTERM after step {at}, resumed, and compared after step {step} with a run never stopped:")
    for what in expected:
        print(f"  {what:10} never stopped {expected[what]}\n  {'':10} resumed       {found[what]}")
    differing = [what for what in expected if expected[what] != found[what]]
    if differing:
        raise CheckpointError(f"the resumed run differs in: {', '.join(differing)}", where=str(work))
    print("equal, bit for bit")
    shutil.rmtree(work)


def _train(straight: _Run, stopped: _Run, longer: str) -> tuple[int, int]:
    """Run both; the step of the stop, and the step that both have a checkpoint of after it. ``longer``: what a recipe
    that is too short has to be given beside more steps."""
    _say("training, to be stopped by SIGTERM")
    if not stopped.train(until=lambda: stopped.last_step() >= STEPS_BEFORE):
        reason = f"the run was over after {stopped.last_step()} steps, before it could be stopped"
        raise RecipeError(reason, where="train", hint=f"give it more steps: {longer}--set train.steps=200")
    at = stopped.last_step()
    _say(f"stopped after step {at}; training the same without a stop")
    straight.train(until=lambda: straight.last_step() >= at + STEPS_AFTER)
    _say("resuming the stopped run")
    stopped.train("--resume", until=lambda: stopped.last_step() >= at + STEPS_AFTER)
    return at, min(at + STEPS_AFTER, straight.last_step(), stopped.last_step())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _command(
    recipe: SDRecipe | LlamaRecipe, path: Path, overrides: list[str], processes: int, run_folder: Path
) -> list[str]:
    changes = [*overrides, f"output.folder={json.dumps(str(run_folder.parent))}", f"output.name={run_folder.name}"]
    changes += ["output.track=[]", "train.checkpoint_every=1", "train.keep_checkpoints=1000000", "sample.prompts=[]"]
    kind = "train-sd" if isinstance(recipe, SDRecipe) else "train-llama"
    sets = [word for change in changes for word in ("--set", change)]
    return [sys.executable, "-m", "lorakit", kind, str(path), *sets, "--num-processes", str(processes)]

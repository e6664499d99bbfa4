"""A rank of a real run, as the command line will be one: python -m tests.training.rank_script FOLDER OPTIONS."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lorakit.errors import LorakitError
from lorakit.storage.runs import RunFolder
from lorakit.training.launch import open_session
from lorakit.training.loop import train
from tests.training.tiny_task import final_state, make_plan, make_task


class Told:
    """Prints each step, and does what the test asked for at one of them."""

    def __init__(self, at: dict[str, str]) -> None:
        self.at = at

    def start(self, total: int, done: int) -> None:
        print(f"start {done}/{total}", flush=True)

    def step(self, step: int, loss: float) -> None:
        print(f"step {step} {loss:.4f}", flush=True)
        if name := self.at.get(str(step)):
            os.kill(os.getpid(), getattr(signal, name))

    def held_out(self, step: int, loss: float, metrics: dict[str, float]) -> None:
        print(f"held out {step} {loss:.4f} {metrics['twice']:.4f}", flush=True)

    def stage(self, text: str) -> None:
        print(text, flush=True)


def main(folder: Path, options: dict[str, Any]) -> int:
    more = {key: options.pop(key) for key in ("nan_at", "delay", "samples", "fate") if key in options}
    apart = options.pop("apart", False)
    resume, at = bool(options.pop("resume", False)), options.pop("at", {})
    plan = make_plan(options, resume=resume)
    session = open_session(plan.compute)
    failed = True
    try:
        opening = RunFolder.open_existing if resume else RunFolder.open_new
        if apart:  # nodes that do not share their disks
            folder = folder / str(session.rank)
        with opening(folder) if apart or session.is_main else RunFolder(folder) as run:
            task = make_task(session, options, **more)
            train(task, session, plan, run, Told(at))
            state = {**final_state(task), "seeds": torch.tensor(task.seeds)}
            save_file(state, folder / f"rank-{session.rank}.safetensors")
        failed = False
    except LorakitError as error:
        # At once, since the ranks' streams are unbuffered and their lines would mix.
        sys.stderr.write(f"error: {error} | {error.hint} | {getattr(error, '__notes__', [])}\n")
        return error.exit_code
    finally:  # as the command line does: a thread of C++ that lives on aborts an interpreter that ends
        session.close(failed=failed)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))

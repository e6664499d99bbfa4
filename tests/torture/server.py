"""The warm process itself: reads a request a line, forks, answers a line. Started by ``tests.torture.warm``."""

import json
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any

from tests.torture import hooks, trace

MODULES = (
    "bitsandbytes.optim", "diffusers", "lorakit.adapters.convert", "lorakit.adapters.merging.merge", "lorakit.cli",
    "lorakit.commands.convert", "lorakit.commands.generate", "lorakit.commands.merge", "lorakit.commands.train",
    "lorakit.families.llama", "lorakit.families.sd", "lorakit.storage.bases",
    "lorakit.training.loop", "matplotlib.figure", "matplotlib.backends.backend_agg",
    "PIL.Image", "psutil", "transformers.models.llama", "transformers.models.clip",
)  # fmt: skip


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warm_up()
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "wait" in request:
            answer = wait(request["wait"])
        else:
            answer = {"pid": start(request)}
        print(json.dumps(answer), file=answers, flush=True)


def warm_up() -> None:
    import importlib

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in MODULES:
        importlib.import_module(name)
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401 (lazily loaded)
    from matplotlib import font_manager  # noqa: F401 (reads the fonts once)
    from transformers import AutoModelForCausalLM, CLIPTextModel, LlamaForCausalLM  # noqa: F401

    torch.set_num_threads(1)
    assert threading.active_count() == 1


TRACED: dict[int, trace.Tracer] = {}


def start(request: dict[str, Any]) -> int:
    wish, after = request["hooks"].pop("trace", None), request["hooks"].pop("kill_after", None)
    number = request["hooks"].pop("number", signal.SIGKILL)
    pid = os.fork()
    if pid == 0:
        run(request, traced=wish is not None)
    if after is not None:
        time.sleep(after)
        os.kill(pid, number)
    if wish is not None:
        TRACED[pid] = trace.Tracer(pid, **wish)
    return pid


def wait(pid: int) -> dict[str, Any]:
    if pid in TRACED:
        tracer = TRACED.pop(pid)
        return {"code": tracer.run(), "operations": tracer.operations}
    return {"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}


def run(request: dict[str, Any], *, traced: bool) -> None:
    """In the child: the command line, and nothing of the parent's is flushed or closed on the way out."""
    code = 1
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, null), (1, log), (2, log)):
            os.dup2(source, target)
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        if traced:
            trace.be_traced()
        hooks.install(**request["hooks"])
        sys.argv = ["lorakit", *request["words"]]
        from lorakit.cli import main as lorakit

        lorakit()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()

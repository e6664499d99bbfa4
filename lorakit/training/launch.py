"""One process or many: ranks, devices and precision by Accelerate, and the start of N ranks by its launcher.

A rank fails either with all the others (an error that ``Session`` shares, so that every rank raises the same one), or
alone; then the launcher and the ranks' ``watch`` end the rest.
"""

import _thread
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, GradScalerKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.tracking import filter_trackers, get_available_trackers
from torch import Tensor, distributed

from lorakit.errors import (
    INTERRUPTED,
    TERMINATED,
    ConflictError,
    LorakitError,
    RankError,
    RecipeError,
    first_line,
    is_out_of_memory,
    shown,
)
from lorakit.recipe.schema import Compute
from lorakit.training.device import choose, make_deterministic
from lorakit.training.stop import AT_ONCE, caught, die_with_parent, end_at_once, show_cursor
from lorakit.training.watch import Watch

OWN_EXIT_CODES = frozenset({*range(10), TERMINATED, INTERRUPTED} - {1})
RANK_0_SECONDS = 15.0
"""How long other ranks wait for rank 0 to tell what none of them can have."""
_PATIENCE = timedelta(minutes=60)
_FIRST_SCALE = 2.0**10
"""Of fp16's loss, which is a sum over tokens: by PyTorch's 2^16 the first updates would overflow and be left out."""
_LOST = ("connection", "closed", "reset by peer", "broken pipe", "timed out", "timeout", "socket")
_LOST_BY_NCCL = ("ncclremoteerror", "remote process exited", "was aborted", "timed out", "timeout")
"""What a collective of gloo or NCCL says when another rank is gone, rather than that this one cannot."""
_REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


@dataclass(frozen=True)
class Session:
    """This process among ``world`` equal ones, each with a whole copy of the model.

    ``dtype`` is that of the base's weights and the matmuls. Collectives must be called by all ranks alike; they raise
    RankError when another rank is gone.
    """

    accelerator: Accelerator
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    watch: Watch | None
    """Over the other ranks, where there are any."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place; returns ``tensor``."""
        if self.world > 1:
            with _lost_rank():
                distributed.all_reduce(tensor)
        return tensor

    def gather(self, item: object) -> list[Any]:
        """Every rank's item, by rank, on every rank."""
        items: list[Any] = [item]
        if self.world > 1:
            items = [None] * self.world
            with _lost_rank():
                distributed.all_gather_object(items, item)
        return items

    def on_main(self, work: Callable[[], None]) -> None:
        """Do ``work`` on rank 0 while the others wait. Its error is raised on every rank.

        On the others it carries a note (``__notes__``), so that it need be told only once.
        """
        failure: Exception | None = None
        if self.is_main:
            try:
                work()
            except Exception as error:
                failure = error
        if self.world > 1:
            told = _portable(failure) if failure is not None else None
            with _lost_rank():
                shared = [told]
                distributed.broadcast_object_list(shared, src=0, device=self.device)
            if not self.is_main and shared[0] is not None:
                failure = shared[0]
                failure.add_note("raised by rank 0")
        if failure is not None:
            raise failure

    @contextmanager
    def told_once(self) -> Iterator[None]:
        """An error in the block that several ranks raise alike carries a note on all but one of them."""
        try:
            yield
        except Exception as error:
            if self.watch is not None and not hasattr(error, "__notes__"):
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as in ``StopSignals``: it must not be cut off
                if not self.watch.is_first(str(error)):
                    error.add_note("told by another rank")
            raise

    def track(self, names: Sequence[str], folder: Path, name: str, config: Mapping[str, Any]) -> None:
        """Start Accelerate's trackers; RecipeError when a tracker's package is not installed."""
        available = {str(tracker) for tracker in get_available_trackers()}
        for missing in [tracker for tracker in names if tracker not in available]:
            raise RecipeError(f"{missing} is not installed", where="output.track", hint=f"pip install {missing}")
        if names:
            self.accelerator.project_configuration.set_directories(str(folder))
            self.accelerator.log_with = filter_trackers(list(names), folder)
            online = {"name": name, "config": dict(config)}
            self.accelerator.init_trackers("lorakit", init_kwargs={"wandb": online, "trackio": online})

    def close(self, *, failed: bool = False) -> None:
        """End trackers and the process group; another session may be opened afterwards.

        ``failed``: this rank leaves with an error, and the others may be in the middle of a step. NCCL would wait for
        them to end the group, so it is left as it is, and they are told.
        """
        if failed and self.watch is not None:
            self.watch.close(failed=True)
            for tracker in self.accelerator.trackers:
                tracker.finish()
        else:
            self.accelerator.end_training()
            if self.watch is not None:
                self.watch.close()
        AcceleratorState._reset_state(reset_partial_state=True)


_LAUNCHER = "LORAKIT_LAUNCHER"
"""Set by ``relaunch``: its process."""
_LAUNCHERS = {"RANK", "LOCAL_RANK", "WORLD_SIZE"}


def open_session(compute: Compute) -> Session:
    """Join the ranks that the launcher started, or be the only one; RecipeError when ``compute`` cannot be had here.

    Where no rank can have it, rank 0 says so, and the launcher ends the others, which wait for that.
    """
    try:
        device, dtype = choose(compute)
    except RecipeError:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(RANK_0_SECONDS)
        raise
    if device.type == "cuda":
        make_deterministic()
        if not _LAUNCHERS & os.environ.keys():
            for name in (
                "NCCL_P2P_DISABLE",
                "NCCL_IB_DISABLE",
            ):  # Accelerate refuses some GPUs without; of no use alone
                os.environ.setdefault(name, "1")
    _die_with_launcher()
    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="fp16" if dtype == torch.float16 else "no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE), GradScalerKwargs(init_scale=_FIRST_SCALE)],
        )
    except ValueError as error:
        if not _LAUNCHERS & os.environ.keys() or "MASTER_ADDR" in os.environ:
            raise
        reason = f"set as a launcher sets it, but not all that goes with it: {first_line(error)}"
        hint = "unset them, or start the ranks by accelerate launch"
        raise RecipeError(reason, where=", ".join(sorted(_LAUNCHERS & os.environ.keys())), hint=hint) from error
    if accelerator.distributed_type not in _REPLICATED:
        reason = f"{accelerator.distributed_type.value} would split the model, which lorakit does not do"
        raise RecipeError(reason, hint="use plain data-parallel ranks: accelerate launch --multi_gpu")
    rank, world = accelerator.process_index, accelerator.num_processes
    watch = Watch(rank, world).start() if world > 1 else None
    return Session(accelerator, rank, world, accelerator.device, dtype, watch)


def relaunch(argv: Sequence[str], processes: int, *, device: str = "auto", module: str = "lorakit") -> int:
    """Run ``python -m lorakit ARGV`` as ``processes`` ranks of this machine and return their exit code.

    SIGTERM and SIGINT go to every rank; a second one kills them (130). RankError when a rank ended by anything
    but one of lorakit's own exit codes; no rank is left behind. For several machines use ``accelerate launch`` itself.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    on_cpu = device == "cpu" or not torch.cuda.is_available()
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # OpenMP takes a list, by level of nesting
    cores = int(threads) if threads.isdecimal() else len(os.sched_getaffinity(0))
    options = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
    options += ["--gpu_ids", "all"]  # else those of the user's own configuration of Accelerate
    options += ["--mixed_precision", "no", "--dynamo_backend", "no", "--monitor_interval", "0.2"]
    options += ["--num_cpu_threads_per_process", str(max(1, cores // processes))]
    if not on_cpu and processes > torch.cuda.device_count():
        reason = f"{processes} processes on {torch.cuda.device_count()} CUDA devices"
        raise ConflictError(reason, where="--num-processes", hint="start at most one process a device")
    arguments = launch_command_parser().parse_args([*options, "-m", module, *argv])
    # The launcher would allow the ranks 30 seconds after a signal; they may take as long as their step and checkpoint.
    arguments.signals_to_handle = "SIGQUIT"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    if sys.path[0] not in ("", os.getcwd()):  # ``python -m`` would import what lies there, a recipe's folder it may be
        os.environ["PYTHONSAFEPATH"] = "1"
    os.environ[_LAUNCHER] = str(os.getpid())
    with _forwarded_signals() as received:
        try:
            launch_command(arguments)
        except ChildFailedError as failed:
            if len(received) > 1:
                show_cursor()
                return INTERRUPTED
            rank, failure = failed.get_first_failure()
            if received and failure.exitcode == -received[0]:  # it had only begun to start
                return INTERRUPTED if received[0] == signal.SIGINT else TERMINATED
            if failure.exitcode in OWN_EXIT_CODES:
                return int(failure.exitcode)
            raise _lost(rank, failure.exitcode) from failed
    return 0


def _lost(rank: int, code: int) -> RankError:
    """The error of a rank that ended with an exit code of the system's: minus a signal, or a crash of Python."""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    memory = "; the system kills by SIGKILL when memory runs out" if code == -signal.SIGKILL else ""
    return RankError(f"rank {rank} {how}", hint=f"go on with --resume{memory}")


@contextmanager
def _forwarded_signals() -> Iterator[list[int]]:
    """Pass the first signal that stops a run on to the children, which have their own process groups, and kill them at
    the next; yields those received, of several at once (``AT_ONCE``) the first."""
    import psutil

    received: list[int] = []
    since = 0.0

    def forward(number: int, _frame: object) -> None:
        nonlocal since
        if not received or time.monotonic() - since > AT_ONCE:
            received.append(number)
            since = time.monotonic()
        last = signal.Signals(number) if len(received) == 1 else signal.SIGKILL
        if not send(last):  # the first rank has still to start
            with suppress(RuntimeError):
                _thread.start_new_thread(send_late, (last,))

    def send(number: signal.Signals) -> bool:
        children = psutil.Process().children()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)
        return bool(children)

    def send_late(number: signal.Signals) -> None:
        while not (over.is_set() or send(number)):
            time.sleep(0.05)

    over = threading.Event()
    earlier = {number: signal.signal(number, forward) for number in caught()}
    try:
        yield received
    finally:
        over.set()
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _die_with_launcher() -> None:
    """See that this rank ends with its launcher, which may be gone already."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
        if os.environ.get(_LAUNCHER, str(os.getppid())) != str(os.getppid()):
            end_at_once(RankError.exit_code)


@contextmanager
def _lost_rank() -> Iterator[None]:
    try:
        yield
    except torch.AcceleratorError:  # of this rank's device, told at its next call
        raise
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        text = str(error)
        if any(word in text.lower() for word in (_LOST_BY_NCCL if "nccl" in text.lower() else _LOST)):
            raise RankError("another rank is gone", hint="go on with --resume") from error
        cause = text.partition("Last error:")[2].strip().splitlines() or [first_line(error)]
        hint = "NCCL_DEBUG=INFO has it say more"
        raise RankError(f"the ranks cannot reach one another: {shown(cause[0])}", hint=hint) from error


def _portable(error: Exception) -> LorakitError:
    """The error as it goes to the other ranks: lorakit's own as they are, others by their text."""
    return error if isinstance(error, LorakitError) else RankError(f"rank 0: {type(error).__name__}: {error}")

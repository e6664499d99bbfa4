"""Real ranks that only watch each other: ``python -m tests.training.watch_script`` prints what became of them as JSON.

Each scenario is a launcher that holds the store, and two ranks, all forked from this process; they run side by side.
"""

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import TCPStore

from lorakit.training import watch

watch.SILENT_LOOKS, watch.ORPHAN_SECONDS, watch.GRACE_SECONDS = 4, 2.0, 0.5
watch._STORE_TIMEOUT = timedelta(seconds=20)  # many processes start at once
LOOKS_SECONDS = watch.SILENT_LOOKS * watch.LOOK_EVERY


def leave_one_after_the_other(rank: int, watching: watch.Watch) -> None:
    time.sleep(1 + 2 * LOOKS_SECONDS * rank)
    watching.close()


def compute_with_the_lock_held(rank: int, watching: watch.Watch) -> None:
    """One call of C that lets no thread run for longer than the others wait for a sign."""
    end = time.monotonic() + 1.5 * LOOKS_SECONDS
    exponent = 10**6
    while rank == 1 and time.monotonic() < end:
        began = time.monotonic()
        pow(3, exponent)
        exponent = exponent * 3 if time.monotonic() - began < 1.2 * LOOKS_SECONDS else 1
    time.sleep(max(0.0, end - time.monotonic()))
    watching.close()


def fail_one(rank: int, watching: watch.Watch) -> None:
    """Rank 0 waits for the one that has failed, as NCCL would have it."""
    if rank == 0:
        wait_forever(rank, watching)
    fail(rank, watching)


def fail(rank: int, watching: watch.Watch) -> None:
    time.sleep(1 + 0.5 * LOOKS_SECONDS * rank)
    watching.close(failed=True)
    os._exit(3)


def wait_forever(_rank: int, _watching: watch.Watch) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def wait_with_stderr(descriptor: int) -> Callable[[int, watch.Watch], None]:
    """A rank that has nobody to tell anything, or one who never reads."""

    def wait(rank: int, watching: watch.Watch) -> None:
        os.dup2(descriptor, 2)
        wait_forever(rank, watching)

    return wait


def closed_pipe() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


def full_pipe() -> int:
    _, write = os.pipe()
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, bytes(4096))
    except BlockingIOError:
        os.set_blocking(write, True)
    return write


# Name: what the ranks do, and what happens to which process after two seconds.
SCENARIOS: dict[str, tuple[Callable[[int, watch.Watch], None], int, int]] = {
    "leave": (leave_one_after_the_other, 0, 0),
    "busy": (compute_with_the_lock_held, 0, 0),
    "one failed": (fail_one, 0, 0),
    "all failed": (fail, 0, 0),
    "killed": (wait_forever, 1, signal.SIGKILL),
    "frozen": (wait_forever, 1, signal.SIGSTOP),
    "frozen, nobody to tell": (wait_with_stderr(closed_pipe()), 1, signal.SIGSTOP),
    "frozen, stderr held up": (wait_with_stderr(full_pipe()), 1, signal.SIGSTOP),
    "no launcher": (wait_forever, -1, signal.SIGKILL),
    "no launcher, one frozen": (wait_forever, -1, signal.SIGSTOP),
}


def forked(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(70)


def main() -> None:
    began = {}
    started, tell = os.pipe()
    for name, (work, _, _) in SCENARIOS.items():
        read, write = os.pipe()

        def rank(number: int, work: Callable[[int, watch.Watch], None] = work, read: int = read) -> None:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.read(read, 5).decode()}
            watching = watch.Watch(number, 2).start()
            os.write(tell, b".")
            work(number, watching)

        def launcher(write: int = write) -> None:
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            os.write(write, f"{store.port:05d}".encode() * 2)
            time.sleep(600)

        ranks = [forked(lambda n=number, rank=rank: rank(n)) for number in (0, 1)]
        began[name] = [*ranks, forked(launcher)]
    met = b""
    while len(met) < 2 * len(SCENARIOS) and select.select([started], [], [], 40)[0]:
        met += os.read(started, 100)
    time.sleep(2)
    for name, (_, which, number) in SCENARIOS.items():
        if number:
            os.kill(began[name][which], number)
        if name == "no launcher, one frozen":
            os.kill(began[name][1], number)
            os.kill(began[name][-1], signal.SIGKILL)
    start, results = time.monotonic(), {}
    for name, (*ranks, launcher_pid) in began.items():
        ends = []
        for pid in ranks:
            descriptor = os.pidfd_open(pid)
            ended = select.select([descriptor], [], [], max(0.0, start + 40 - time.monotonic()))[0]
            if not ended:
                os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            ends.append(code if ended else "alive")
        results[name] = ends
        os.kill(launcher_pid, signal.SIGKILL)
        os.waitpid(launcher_pid, 0)
    print(json.dumps({"ends": results, "seconds": time.monotonic() - start}))


if __name__ == "__main__":
    main()

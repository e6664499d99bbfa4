"""What a child does to itself: a signal at a chosen micro-batch, or a safeguard taken away to see the harness bite."""

import os
import signal
import time
from typing import Any


def install(
    *, signal_at: tuple[int, str] | None = None, signals: int = 1, without: str = "", file_limit: int = 0
) -> None:
    """``signal_at``: (n, name) sends this process the signal, ``signals`` times, as it takes its n-th micro-batch.

    ``without``: a key of ``TEETH``. ``file_limit``: the largest file that the kernel lets it write, in bytes.
    """
    if signal_at is not None:
        _signal_at(*signal_at, signals)
    if without:
        TEETH[without]()
    if file_limit:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))


def _signal_at(micro_batch: int, name: str, times: int) -> None:
    from lorakit.training.prefetch import Prefetch
    from lorakit.training.stop import AT_ONCE

    taken = 0
    plain: Any = Prefetch.__next__

    def counting(self: Any) -> Any:
        nonlocal taken
        if taken == micro_batch:
            for number in range(times):
                time.sleep(1.2 * AT_ONCE * (number > 0))
                os.kill(os.getpid(), getattr(signal, name))
        taken += 1
        return plain(self)

    setattr(Prefetch, "__next__", counting)  # noqa: B010 (mypy)


def _no_fsync() -> None:
    os.fsync = lambda _: None  # type: ignore[assignment]


def _no_manifest() -> None:
    from lorakit.storage import manifest

    manifest.check_manifest = lambda _: None


def _no_rng() -> None:
    import torch

    torch.manual_seed(0)
    torch.manual_seed = lambda _: torch.default_generator  # type: ignore[assignment]


def _no_place_in_data() -> None:
    from lorakit.numerics import order

    plain = order.update
    first: list[int] = []

    def from_zero(layout: Any, keys: Any, step: int) -> Any:
        first.append(step)
        return plain(layout, keys, step - first[0])

    order.update = from_zero


def _no_optimizer() -> None:
    from lorakit.training import checkpoint

    checkpoint.load_optimizer = lambda *_: None


TEETH = {
    "fsync": _no_fsync,
    "manifest": _no_manifest,
    "rng": _no_rng,
    "place in the data": _no_place_in_data,
    "optimizer state": _no_optimizer,
}

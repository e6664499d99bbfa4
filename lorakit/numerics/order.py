"""Which example comes when, and with which randomness: pure functions of (seed, step).

Nothing here has state, so a resumed run needs only the number of finished steps. The stream of examples is one
permutation an epoch, end to end, cut into batches. Windows of up to 16 batches are sorted by a key (token count,
picture size), cut anew and shuffled, so that a batch holds examples of like size. A window ends where an epoch does,
with the batch that holds the epoch's last example: by then each has come.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

WINDOW = 16


@dataclass(frozen=True)
class Layout:
    """How one update's ``batch_size`` examples are dealt out: ``world`` ranks x ``accumulation`` micro-batches each."""

    seed: int
    batch_size: int
    accumulation: int = 1
    rank: int = 0
    world: int = 1

    @property
    def micro_batch(self) -> int:
        """Examples in one micro-batch of one rank."""
        return self.batch_size // (self.accumulation * self.world)


@dataclass(frozen=True)
class Draw:
    """One example of one update: its index in the data, and the seed of what is drawn for it: a picture's noise, time,
    and whether it keeps its caption."""

    index: int
    seed: int


def mix(*parts: int) -> int:
    """A 63-bit seed from non-negative integers, by numpy's SeedSequence: equal inputs only give equal seeds."""
    low, high = np.random.SeedSequence(parts).generate_state(2, np.uint32)
    return (int(high) << 32 | int(low)) >> 1


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of ``count`` examples in one epoch, int64 [count]."""
    return np.random.Generator(np.random.PCG64(mix(seed, 1, epoch))).permutation(count)


def stream(seed: int, count: int, start: int, length: int) -> list[int]:
    """``length`` indices of the endless stream of epochs, from position ``start``."""
    return [int(permutation(seed, p // count, count)[p % count]) for p in range(start, start + length)]


def window(count: int, size: int, step: int) -> tuple[int, int]:
    """The steps, from the first up to but not with the last, whose batches of ``size`` examples are sorted together."""
    epoch = step * size // count
    first, last = (-(-whole * count // size) for whole in (epoch, epoch + 1))
    batches = last - first
    windows = -(-batches // WINDOW)
    number = ((step - first + 1) * windows - 1) // batches
    return first + number * batches // windows, first + (number + 1) * batches // windows


def update(layout: Layout, keys: Sequence[int], step: int) -> list[Draw]:
    """The ``batch_size`` examples of one update, over all ranks. ``keys``: one sorting key an example."""
    size = layout.batch_size
    first, last = window(len(keys), size, step)
    indices = stream(layout.seed, len(keys), first * size, (last - first) * size)
    indices.sort(key=lambda i: keys[i])
    order = np.random.Generator(np.random.PCG64(mix(layout.seed, 2, first))).permutation(last - first)
    batch = int(order[step - first])
    chosen = indices[batch * size : (batch + 1) * size]
    return [Draw(index, mix(layout.seed, 3, step, slot)) for slot, index in enumerate(chosen)]


def micro_batches(layout: Layout, keys: Sequence[int], start: int) -> Iterator[list[Draw]]:
    """This rank's micro-batches from optimizer step ``start`` on, endless, ``accumulation`` of them a step.

    The union over ranks and micro-batches of a step is ``update(layout, keys, step)`` whatever the layout.
    """
    step, parts = start, layout.accumulation * layout.world
    while True:
        draws = update(layout, keys, step)
        for micro in range(layout.accumulation):
            yield draws[micro * layout.world + layout.rank :: parts]
        step += 1

"""The order of examples: each once an epoch, the same whatever the layout, a function of the step alone."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.numerics.order import WINDOW, Layout, micro_batches, mix, stream, update, window


@given(st.integers(0, 2**32), st.integers(1, 200), st.integers(0, 5))
def test_an_epoch_holds_each_example_once(seed: int, count: int, epoch: int) -> None:
    assert sorted(stream(seed, count, epoch * count, count)) == list(range(count))


def test_epochs_differ_and_seeds_differ() -> None:
    assert stream(0, 50, 0, 50) != stream(0, 50, 50, 50)
    assert stream(0, 50, 0, 50) != stream(1, 50, 0, 50)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.integers(1, 150), st.sampled_from([1, 2, 4, 8, 16]))
def test_every_example_has_come_when_an_epoch_ends(seed: int, count: int, size: int) -> None:
    """The last batch is filled from the next epoch; beside that sorting changes the order only."""
    keys, layout = [i * 7 % 13 for i in range(count)], Layout(seed, size)
    drawn: list[int] = []
    for epochs in (1, 2, 3):
        steps = -(-epochs * count // size)
        drawn += [d.index for step in range(len(drawn) // size, steps) for d in update(layout, keys, step)]
        assert sorted(drawn) == sorted(stream(seed, count, 0, steps * size))
        assert min(Counter(drawn)[index] for index in range(count)) >= epochs


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(0, 2000))
def test_windows_stand_end_to_end(count: int, size: int, step: int) -> None:
    first, last = window(count, size, step)
    assert first <= step < last <= first + WINDOW
    assert window(count, size, first) == window(count, size, last - 1) == (first, last)
    assert window(count, size, last)[0] == last


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 8), (2, 4), (4, 2), (8, 1)])
def test_every_layout_draws_the_same_update(world: int, accumulation: int) -> None:
    keys = [i * 31 % 17 for i in range(100)]
    for start in (0, 5):
        drawn = []
        for rank in range(world):
            layout = Layout(3, 8, accumulation, rank, world)
            micros = list(islice(micro_batches(layout, keys, start), accumulation))
            assert [len(m) for m in micros] == [layout.micro_batch] * accumulation
            drawn += [d for m in micros for d in m]
        expected = update(Layout(3, 8), keys, start)
        assert sorted(drawn, key=lambda d: d.seed) == sorted(expected, key=lambda d: d.seed)


def test_windows_hold_like_lengths_together_in_shuffled_batches() -> None:
    keys = list(range(160))
    batches = [[keys[d.index] for d in update(Layout(0, 10), keys, step)] for step in range(16)]
    assert all(max(lengths) - min(lengths) == 9 for lengths in batches)
    assert [lengths[0] for lengths in batches] != sorted(lengths[0] for lengths in batches)


def test_seeds_of_examples_never_meet() -> None:
    layout, keys = Layout(0, 8), list(range(40))
    seeds = [d.seed for step in range(500) for d in update(layout, keys, step)]
    assert len(set(seeds)) == len(seeds)
    assert mix(0, 1) != mix(1, 0)
    assert 0 <= mix(5, 2) < 2**63

"""A thread that works a few blocks behind: in order, with few blocks waiting, and with no error lost."""

import threading

import pytest
import torch

from lorakit.adapters.merging.behind import DEPTH, Behind


def test_in_order_and_all() -> None:
    seen: list[int] = []
    with Behind(seen.append) as behind:
        for number in range(100):
            behind.put(number)
        behind.wait()
        assert seen == list(range(100))


def test_torch_takes_one_core_in_it_and_as_many_as_before_outside() -> None:
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        with Behind(lambda _: seen.append(torch.get_num_threads())) as behind:
            behind.put(0)
            behind.wait()
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def test_an_error_comes_out() -> None:
    def work(number: int) -> None:
        if number == 1:
            raise OSError(28, "No space left on device")

    with Behind(work) as behind:
        for number in range(DEPTH + 1):
            behind.put(number)
        with pytest.raises(OSError, match="No space left"):
            behind.put(DEPTH + 1)
    with Behind(work) as behind:
        behind.put(1)
        with pytest.raises(OSError, match="No space left"):
            behind.wait()


def test_what_has_not_begun_is_given_up() -> None:
    seen: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    def work(number: int) -> None:
        begun.set()
        go_on.wait(10)
        seen.append(number)

    with Behind(work) as behind:
        for number in range(DEPTH):
            behind.put(number)
        begun.wait(10)
        threading.Timer(0.05, go_on.set).start()
    assert seen == [0]

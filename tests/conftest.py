"""What all tests have in common: none writes to the user's cache, and those that run side by side share the cores."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # before torch is imported, and for the programs that the tests start
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // WORKERS)))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What may take seconds of processor time, chat templates and tokenizers, is stopped after one."""
    from lorakit.data import template_worker, tokenizer_worker

    for worker in (template_worker, tokenizer_worker):
        monkeypatch.setattr(worker, "SECONDS", 1)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A process with everything imported, whose forks run the command line."""
    from tests.torture.warm import Warm

    with Warm(tmp_path_factory.mktemp("warm")) as server:
        yield server

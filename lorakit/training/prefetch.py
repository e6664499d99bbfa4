"""The next micro-batches, made ready in a background thread."""

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
_DEPTH = 2


class Prefetch(Generic[Item]):
    """An iterator over ``source`` that runs up to two items ahead. What ``source`` raises is raised by ``next``.

    ``source`` runs in another thread, so it must not draw from the global random generator.
    """

    def __init__(self, source: Iterator[Item]) -> None:
        self._source = source
        self._items: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(_DEPTH)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="lorakit-prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> Item:
        item, error = self._items.get()
        if error is not None:
            raise error
        assert item is not None
        return item

    def __iter__(self) -> "Prefetch[Item]":
        return self

    def close(self) -> None:
        """End the thread after the item it is making."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._items.get(timeout=0.01)
            except queue.Empty:
                continue

    def _fill(self) -> None:
        try:
            for item in self._source:
                if self._closed.is_set():
                    return
                self._items.put((item, None))
            self._items.put((None, StopIteration()))
        except BaseException as error:
            self._items.put((None, error))

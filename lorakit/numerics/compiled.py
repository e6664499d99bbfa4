"""``torch.compile`` put off until the first call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch


@contextmanager
def compiled_when_called() -> Iterator[None]:
    """What ``torch.compile`` decorates inside is handed to it when it is first called, not before.

    ``torch.compile`` imports its compiler at once, which takes 1.2 to 2.4 s. bitsandbytes decorates four functions when
    it is imported, as PEFT imports it: they are for devices that it has no kernels for.
    """
    real: Callable[..., Any] = torch.compile

    def compile_later(model: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if model is None:
            return lambda decorated: compile_later(decorated, **options)
        compiled = cache(lambda: real(model, **options))
        return wraps(model)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = compile_later
    try:
        yield
    finally:
        torch.compile = real

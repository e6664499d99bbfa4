"""Reading by transformers, its errors told as lorakit's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging as transformers_logging

from lorakit.storage.bases import BaseLocation
from lorakit.storage.foreign import model_errors


@contextmanager
def readable(location: BaseLocation) -> Iterator[None]:
    """transformers' errors as ModelError, its progress bars hidden."""
    bars: Any = transformers_logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        with model_errors(location.name):
            yield
    finally:
        if shown:
            bars.enable_progress_bar()

"""Libraries at work on files that are not ours: whatever they raise is an error that names the file."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lorakit.errors import LorakitError, ModelError, ResourceError, is_out_of_memory
from lorakit.storage.disk import disk_errors

log = logging.getLogger("lorakit")


@contextmanager
def model_errors(where: str, doing: str = "cannot be loaded") -> Iterator[None]:
    """What transformers, diffusers and others raise on a model's files becomes ModelError; on short memory, or a full
    disk, ResourceError. lorakit's own errors pass.

    They check little of what a config says before they use it, so anything may come: TypeError, ZeroDivisionError,
    AssertionError, errors of their own.
    """
    try:
        with disk_errors():
            yield
    except LorakitError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            hint = "free some memory, or take a smaller model; a language model trains and answers in 4 bit (nf4) too"
            raise ResourceError("not enough memory for the model", where=where, hint=hint) from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        text = f"{type(error).__name__}: {lines[0]}" if not isinstance(error, OSError | RuntimeError) else lines[0]
        raise ModelError(f"{doing}: {text[:300]}", where=where) from error


def check_complete(report: Mapping[str, Any], where: str) -> None:
    """``report`` is what transformers and diffusers call loading info; a tensor that the weights lack is a ModelError.

    Both libraries would fill it with random numbers and go on. Tensors that are not used are a warning.
    """
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ModelError(f"the weights lack {missing[0]}{more}", where=where, hint="get the whole model again")
    if unused := sorted(report["unexpected_keys"]):
        log.warning("%s: %d tensors are not used, %s among them", where, len(unused), unused[0])

"""What a person reads when a command fails: one line, what to do about it, and the exit code."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import TextIO

from lorakit.errors import (
    DISK_ERRORS,
    INTERRUPTED,
    DataError,
    LorakitError,
    ModelError,
    RecipeError,
    ResourceError,
    first_line,
    is_out_of_memory,
    shown,
)

ROOMS: dict[str, type[LorakitError]] = {"recipe": RecipeError, "data": DataError}
"""What an exception that nobody foresaw is called, by the folder that it came from; elsewhere it is a ModelError."""


def guarded(command: Callable[[], object]) -> int:
    """Run ``command``; what it raises is told on stderr, and its exit code returned: ``errors`` has the list.

    The traceback is shown only with --debug.
    """
    try:
        code = command()
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return _nobody_reads()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # which typer makes an exit code of its own of
            return _nobody_reads()
        _flush_or_let_go()
        raise
    except Exception as error:
        _flush_or_let_go()
        if os.environ.get("LORAKIT_DEBUG"):
            traceback.print_exc()
        told = error if isinstance(error, LorakitError) else _named(error)
        try:
            return tell(told)
        except OSError:
            _let_go_of_output()
            return told.exit_code


def _nobody_reads() -> int:
    """Whoever read our output has gone; Python would complain once more when it flushes at exit."""
    _let_go_of_output()
    return ResourceError.exit_code


def _flush_or_let_go() -> None:
    """What cannot be written now can neither at exit, where Python would make another exit code of it."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _let_go_of(sys.stdout)


def _let_go_of_output() -> None:
    for stream in (sys.stdout, sys.stderr):
        _let_go_of(stream)


def _let_go_of(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def tell(error: LorakitError) -> int:
    """Print ``lorakit: error: WHERE: REASON`` and what to do about it; the exit code.

    What every rank raises alike is told by one alone; ``Session`` has put a note on the others' errors.
    """
    rank = os.environ.get("RANK", "0")
    if hasattr(error, "__notes__"):
        return error.exit_code
    red, plain = ("\033[31m", "\033[0m") if _in_colour() else ("", "")
    who = "" if rank == "0" else f" rank {rank}:"
    first, *more = [str(error), *error.details]
    lines = [f"{red}lorakit: error:{plain}{who} {shown(first)}"]
    lines += [f"  {shown(line)}" for line in [*more, *([error.hint] if error.hint else [])]]
    sys.stderr.write("\n".join([*lines, ""]))  # at once: ranks' lines would mix
    return error.exit_code


def _in_colour() -> bool:
    return sys.stderr.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def _named(error: Exception) -> LorakitError:
    """An exception of Python's or a library's as an error of lorakit's."""
    text = first_line(error)
    if is_out_of_memory(error):
        return ResourceError(
            "out of memory",
            hint="free some memory, or take a smaller model, smaller examples or pictures, or fewer bits",
        )
    hint = DISK_ERRORS.get(error.errno or 0) if isinstance(error, OSError) else None
    if isinstance(error, OSError) and hint and (error.filename or not isinstance(error, PermissionError)):
        return ResourceError(f"cannot read or write: {error.strerror}", where=str(error.filename or ""), hint=hint)
    kind: type[LorakitError] = ModelError
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        _, inside, path = frame.filename.replace(os.sep, "/").rpartition("/lorakit/")
        if inside:
            kind, place = ROOMS.get(path.partition("/")[0], ModelError), f"lorakit/{path}:{frame.lineno}"
    hint = "nobody foresaw this: please report it, with what `lorakit --debug ...` prints"
    return kind(f"{type(error).__name__}: {text} (at {place})", hint=hint)

"""Every failure that lorakit reports, each with its exit code.

LorakitError
├── RecipeError        2   the recipe or the command line
├── DataError          3   pictures, captions, chats
├── ModelError         4   a base model, an adapter, a merge that does not verify
├── NonFiniteError     5   NaN or infinity in a loss, a gradient or a picture
├── ResourceError      6   disk or memory
├── ConflictError      7   something is in the way: an existing output, another run
├── RankError          8   a rank was lost
└── CheckpointError    9   no checkpoint that can be trusted

A run stopped by a signal exits 75 after saving (SIGTERM) or 130 (SIGINT): ``Stopped``.
"""

import errno
from collections.abc import Sequence

TERMINATED = 75
"""Exit code of what SIGTERM stopped, with what was finished saved."""
INTERRUPTED = 130
"""Exit code of a run that SIGINT stopped."""
_FULL = {errno.ENOSPC: "free some space, or write elsewhere", errno.EDQUOT: "free some space, or write elsewhere"}
_FORBIDDEN = dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "choose a folder that can be written")
_GONE = dict.fromkeys(
    (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN),
    "the file system does not answer: check the disk or the mount, then go on",
)
_UNABLE = dict.fromkeys(
    (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP), "this file system lacks what a safe write needs: write to another"
)
DISK_ERRORS: dict[int, str] = {
    **_FULL,
    **_FORBIDDEN,
    **_GONE,
    **_UNABLE,
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "let more files be open at once: ulimit -n 4096"),
    errno.EFBIG: "the file system, or a limit, allows no file of this size: write elsewhere",
    errno.ENAMETOOLONG: "choose a shorter name",
}
"""What to do about the numbers of the operating system's errors that speak of a disk, not of what lorakit does."""


def shown(name: object) -> str:
    """A name or message fit for one line of a terminal: control characters and line breaks escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def first_line(error: BaseException) -> str:
    """The first line of what a library says, or its error's name when it says nothing."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return shown(lines[0].strip() if lines else type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch, the libraries of CUDA or the operating system say that memory is short, or did before a
    library made another error of it."""
    own = ("not enough memory", "can't allocate memory", "out of memory", "cannot allocate memory", "bad_alloc")
    system = ("failed to map segment from shared object", "can't start new thread")
    cuda = ("status_alloc_failed", "cublas_status_not_initialized", "failed to cuda calloc")  # cuBLAS, cuDNN, NCCL
    cudnn = ("device_allocation_failed", "unable to find an engine")  # after one algorithm after another
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if isinstance(error, MemoryError) or any(text in str(error).lower() for text in (*own, *system, *cuda, *cudnn)):
        return True
    return before is not None and is_out_of_memory(before)


class LorakitError(Exception):
    """A failure told in one line: where (file, line, field), what, and what to do about it.

    ``hint`` is what the reader can do; ``where`` is ``FILE``, ``FILE:LINE`` or a field's name. ``details`` are further
    lines, one a fault, where several are told at once.
    """

    exit_code = 1

    def __init__(self, reason: str, *, where: str = "", hint: str = "", details: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.reason = reason
        self.where = where
        self.hint = hint
        self.details = tuple(details)

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" if self.where else self.reason


class RecipeError(LorakitError):
    exit_code = 2


class DataError(LorakitError):
    exit_code = 3


class ModelError(LorakitError):
    exit_code = 4


class NonFiniteError(LorakitError):
    exit_code = 5


class ResourceError(LorakitError):
    exit_code = 6


class ConflictError(LorakitError):
    exit_code = 7


class RankError(LorakitError):
    exit_code = 8


class CheckpointError(LorakitError):
    exit_code = 9


class Stopped(LorakitError):
    """A signal asked a run to stop, or a command that makes many things: what is finished is saved."""

    def __init__(self, reason: str, *, exit_code: int, hint: str = "") -> None:
        super().__init__(reason, hint=hint)
        self.exit_code = exit_code

"""Stops a child at every system call that changes files, by ptrace and a seccomp filter: Linux on x86-64.

The tracer sees what the kernel sees, so the writes of libraries in Rust and C++ are counted too. At a chosen call the
child is killed with SIGKILL before the kernel carries the call out, or with half of a write done; or the call fails, as
it does on a disk that is full or breaks.
"""

import ctypes
import errno
import os
import platform
import signal
import struct
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Calls by number: name, and where a path or an open file stands among the arguments.
_PATH, _AT, _FILE, _PATHS, _AT_PATHS = range(5)
CALLS = {
    1: ("write", _FILE), 2: ("open", _PATH), 18: ("pwrite64", _FILE), 20: ("writev", _FILE), 40: ("sendfile", _FILE),
    74: ("fsync", _FILE), 75: ("fdatasync", _FILE), 76: ("truncate", _PATH), 77: ("ftruncate", _FILE),
    82: ("rename", _PATHS), 83: ("mkdir", _PATH), 84: ("rmdir", _PATH), 85: ("creat", _PATH), 86: ("link", _PATHS),
    87: ("unlink", _PATH), 88: ("symlink", _PATHS), 90: ("chmod", _PATH), 91: ("fchmod", _FILE), 257: ("openat", _AT),
    258: ("mkdirat", _AT), 263: ("unlinkat", _AT), 264: ("renameat", _AT_PATHS), 265: ("linkat", _AT_PATHS),
    268: ("fchmodat", _AT), 285: ("fallocate", _FILE), 316: ("renameat2", _AT_PATHS), 326: ("copy_file_range", _FILE),
    452: ("fchmodat2", _AT),
}  # fmt: skip
_FLAGS_AT = {2: 1, 257: 2}
_CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long
_TRACEME, _CONT, _GETREGS, _POKEUSER, _SYSCALL, _SETOPTIONS = 0, 7, 12, 6, 24, 0x4200
_OPTIONS = 0x2 | 0x4 | 0x8 | 0x10 | 0x80 | 0x100000  # fork, vfork, clone, exec, seccomp; kill the child with the tracer
_EVENT_SECCOMP, _TGKILL = 7, 234
_WALL = 0x40000000
_REGISTERS = struct.Struct("27Q")
_DI, _SI, _DX, _R10, _AX, _ORIG_AX = 14, 13, 12, 7, 10, 15


@cache
def supported() -> bool:
    """Whether this system is the one that the tracer knows, and lets processes be traced."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    attempt = "from tests.torture import trace; trace.be_traced(wait=False)"
    done = subprocess.run([sys.executable, "-c", attempt], cwd=ROOT, capture_output=True, check=False)
    return done.returncode == 0


def be_traced(*, wait: bool = True) -> None:
    """In the child, while it has one thread: wait for the tracer, then put the filter in place."""
    _check(_libc.ptrace(_TRACEME, 0, None, None))
    if wait:
        os.kill(os.getpid(), signal.SIGSTOP)
    put_in_place(_filter())


def put_in_place(program: bytes) -> None:
    """A seccomp filter, in classic BPF, for this thread and those that it starts."""
    instructions = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(instructions)))
    _check(_libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
    _check(_libc.prctl(22, 2, ctypes.byref(header), 0, 0))  # PR_SET_SECCOMP, filter mode


class Tracer:
    """Runs a traced child to its end. ``operations``: (call, path, second path or "") of each call below ``root``.

    ``kill_at``: the signal ``number`` at the operation of this number (from 0), and once more ``again`` seconds later,
    at the next; with ``torn`` a write is cut to half its bytes and done first. With ``error`` the operation fails with
    this errno instead; where it is ENOSPC, all later ones that need room do too.
    """

    def __init__(
        self, pid: int, root: str, kill_at: int = -1, torn: bool = False, number: int = signal.SIGKILL,
        again: float = 0.0, error: int = 0,
    ) -> None:  # fmt: skip
        self.pid, self.root, self.kill_at, self.torn, self.number = pid, root, kill_at, torn, number
        self.again, self.error = again, error
        self.operations: list[tuple[str, str, str]] = []

    def run(self) -> int:
        """The child's exit code, or minus the signal that ended it."""
        os.waitpid(self.pid, _WALL)
        _check(_libc.ptrace(_SETOPTIONS, self.pid, None, _OPTIONS))
        _libc.ptrace(_CONT, self.pid, None, None)
        while True:
            pid, status = os.waitpid(-1, _WALL)
            if pid == self.pid and (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
                return os.waitstatus_to_exitcode(status)
            if not os.WIFSTOPPED(status):
                continue
            request, number = _CONT, os.WSTOPSIG(status)
            if number == signal.SIGTRAP:
                number = 0
                if status >> 16 == _EVENT_SECCOMP:
                    request = self._call(pid)
            elif number == signal.SIGSTOP and pid != self.pid:
                number = 0  # a new thread reports
            _libc.ptrace(request, pid, None, number)

    def _call(self, pid: int) -> int:
        """Note the call that ``pid`` is about to make; how to let it go on."""
        buffer = ctypes.create_string_buffer(_REGISTERS.size)
        if _libc.ptrace(_GETREGS, pid, None, ctypes.cast(buffer, ctypes.c_void_p)) < 0:
            return _CONT  # killed meanwhile
        registers = _REGISTERS.unpack(buffer.raw)
        name, kind = CALLS[registers[_ORIG_AX]]
        first, second = self._paths(pid, kind, registers)
        if not (first.startswith(self.root) or second.startswith(self.root)):
            return _CONT
        self.operations.append((name, self._local(first), self._local(second)))
        late = len(self.operations) - 1 - self.kill_at
        if self.error:
            full = self.error == errno.ENOSPC and name in WRITES | OPENS
            if self.kill_at >= 0 and (late == 0 or (late > 0 and full)):
                _libc.ptrace(_POKEUSER, pid, 8 * _ORIG_AX, ctypes.c_void_p(-1))  # no call: the kernel does nothing
                _libc.ptrace(_POKEUSER, pid, 8 * _AX, ctypes.c_void_p(-self.error))
            return _CONT
        if late == 1 and self.again:
            time.sleep(self.again)
            self._signal()
        if late != 0:
            return _CONT
        if self.torn and name == "write" and registers[_DX] > 1:
            _libc.ptrace(_POKEUSER, pid, 8 * _DX, registers[_DX] // 2)
            _libc.ptrace(_SYSCALL, pid, None, None)
            os.waitpid(pid, _WALL)
        self._signal()
        return _CONT

    def _signal(self) -> None:
        """To the main thread, which the kernel passes over while it is stopped: by another one Python would hear of a
        signal late, and of two at once."""
        _check(_libc.syscall(_TGKILL, self.pid, self.pid, self.number))

    def _local(self, path: str) -> str:
        return path.removeprefix(self.root).lstrip("/")

    def _paths(self, pid: int, kind: int, registers: tuple[int, ...]) -> tuple[str, str]:
        if kind == _FILE:
            return _link(f"/proc/{pid}/fd/{registers[_DI] & 0xFFFFFFFF}"), ""
        if kind == _PATH:
            return _path(pid, -100, registers[_DI]), ""
        if kind == _AT:
            return _path(pid, registers[_DI], registers[_SI]), ""
        if kind == _PATHS:
            return _path(pid, -100, registers[_DI]), _path(pid, -100, registers[_SI])
        return _path(pid, registers[_DI], registers[_SI]), _path(pid, registers[_DX], registers[_R10])


WRITES = {"write", "pwrite64", "writev", "sendfile", "copy_file_range", "ftruncate", "fallocate"}
OPENS = {"open", "openat", "creat", "mkdir", "mkdirat"}
REMOVALS = {"rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir"}


def unsynced(operations: list[tuple[str, str, str]], folder: str) -> list[str]:
    """What breaks the protocol of a safe save below ``folder``. No power loss can be made here; its order can be seen.

    Before a rename, every file under the old name was flushed after its last write, and the folders that hold them and
    that were made to hold the new name were too. After it, the folder of the new name is flushed before anything there
    is removed or renamed.
    """
    faults: list[str] = []
    dirty: set[str] = set()
    made: set[str] = set()
    renamed: set[str] = set()
    for call, first, second in operations:
        parent = _parent(first)
        if call in WRITES:
            dirty.add(first)
        elif call in OPENS:
            dirty |= {first, parent}
            made |= {first} if call.startswith("mkdir") else set()
        elif call in ("fsync", "fdatasync"):
            dirty.discard(first)
            made = {path for path in made if _parent(path) != first}
            renamed = {path for path in renamed if _parent(path) != first}
        elif call in REMOVALS:
            here = sorted(path for path in renamed if _parent(path) == parent)
            faults += [f"{path} was renamed and its folder not flushed before {call} {first}" for path in here]
            moved = {path for path in dirty if path == first or path.startswith(f"{first}/")}
            if second.startswith(folder) and "/.tmp-" not in second:
                above = {path for path in made if second.startswith(f"{path}/")}
                faults += [f"{path} was not flushed before its rename to {second}" for path in sorted(moved | above)]
                renamed.add(second)
            elif second:
                dirty |= {second + path.removeprefix(first) for path in moved}
            dirty -= moved
            made -= {path for path in made if path == first or path.startswith(f"{first}/")}
    return faults + [f"{path} was renamed and its folder never flushed" for path in sorted(renamed)]


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _filter() -> bytes:
    """Classic BPF: trace the calls above, opens only when they can change something; let all others pass."""
    load, equal, bits, answer = 0x20, 0x15, 0x45, 0x06
    trace, allow = 0x7FF00000, 0x7FFF0000
    program = [(load, 0, 0, 0)]
    for number in CALLS:
        if number in _FLAGS_AT:
            program.append((equal, 0, 4, number))
            program.append((load, 0, 0, 16 + 8 * _FLAGS_AT[number]))
            program.append((bits, 0, 1, _CHANGING))
            program.append((answer, 0, 0, trace))
            program.append((answer, 0, 0, allow))
        else:
            program.append((equal, 0, 1, number))
            program.append((answer, 0, 0, trace))
    program.append((answer, 0, 0, allow))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def _path(pid: int, folder: int, address: int) -> str:
    try:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            text = os.fsdecode(os.pread(memory.fileno(), 4096, address).split(b"\0", 1)[0])
    except OSError:
        return ""
    folder = ctypes.c_int(folder & 0xFFFFFFFF).value
    base = _link(f"/proc/{pid}/cwd" if folder == -100 else f"/proc/{pid}/fd/{folder}")
    return os.path.normpath(Path(base) / text)


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _check(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

"""A kernel that refuses calls, as file systems do that lack them: by a seccomp filter, on Linux on x86-64."""

import errno
import struct
from collections.abc import Mapping

from tests.torture.trace import put_in_place

# By name: numbers of calls, and which argument must have which bits for the call to be refused (all of them, without).
CALLS: Mapping[str, list[tuple[int, int, int]]] = {
    "flock": [(73, 0, 0)],
    "fsync": [(74, 0, 0)],
    "chmod": [(number, 0, 0) for number in (90, 91, 268, 452)],
    "exchange": [(316, 4, 2)],
    "rename": [(82, 0, 0)],
    "open what is no link": [(257, 2, 0o400000)],
    "remove a folder": [(84, 0, 0), (263, 2, 0x200)],
    "tell what is free": [(137, 0, 0), (138, 0, 0)],
    "map shared": [(9, 3, 1)],
    "a socket of the internet": [(41, 0, 2)],  # AF_INET is 2, AF_INET6 is 10; AF_UNIX is 1, AF_NETLINK 16
}
DEATH = -1
"""Instead of an error: the process ends by SIGSYS."""
BARE = {
    "flock": errno.ENOLCK,
    "fsync": errno.EINVAL,
    "chmod": errno.EPERM,
    "exchange": errno.EINVAL,
    "tell what is free": errno.ENOSYS,
    "map shared": errno.ENODEV,
}
"""What file systems over networks and foreign disks lack, all at once."""


def refuse(calls: Mapping[str, int]) -> None:
    """From now on this thread, and those that it starts, get these errors from the kernel, or ``DEATH``."""
    load, equal, bits, answer = 0x20, 0x15, 0x45, 0x06
    allow, error, kill = 0x7FFF0000, 0x00050000, 0x80000000
    program = []
    for name, number in calls.items():
        for call, argument, mask in CALLS[name]:
            program.append((load, 0, 0, 0))
            program.append((equal, 0, 3 if mask else 1, call))
            if mask:
                program += [(load, 0, 0, 16 + 8 * argument), (bits, 0, 1, mask)]
            program.append((answer, 0, 0, kill if number == DEATH else error | number))
    program.append((answer, 0, 0, allow))
    put_in_place(b"".join(struct.pack("HBBI", *instruction) for instruction in program))

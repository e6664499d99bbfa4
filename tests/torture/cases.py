"""When a run is stopped: the micro-batch that it takes as the signal comes, and the signal."""

from tests.torture.runs import ACCUMULATION, PER_EPOCH

STOPS = {
    "at an epoch's end": (ACCUMULATION * (PER_EPOCH - 1), "SIGTERM"),
    "in mid-epoch": (ACCUMULATION * PER_EPOCH, "SIGTERM"),
    "in mid-accumulation": (ACCUMULATION * (PER_EPOCH + 1) + 1, "SIGTERM"),
    "killed in mid-accumulation": (ACCUMULATION * (PER_EPOCH + 1) + 1, "SIGKILL"),
}
FROZEN = {"frozen in mid-accumulation": (ACCUMULATION * (PER_EPOCH + 1) + 1, "SIGSTOP")}
"""Where there are two ranks."""

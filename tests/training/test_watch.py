import json
import subprocess
import sys

import pytest

from lorakit.errors import RankError
from lorakit.training.watch import SILENT_LOOKS, Peer


@pytest.fixture(scope="module")
def ends() -> dict[str, list[int]]:
    command = [sys.executable, "-m", "tests.training.watch_script"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    told: dict[str, list[int]] = json.loads(done.stdout)["ends"]
    return told


@pytest.mark.parametrize(
    ("scenario", "codes"),
    [
        ("leave", [0, 0]),
        ("busy", [0, 0]),
        ("one failed", [RankError.exit_code, 3]),
        ("all failed", [3, 3]),
        ("killed", [RankError.exit_code, -9]),
        ("frozen", [RankError.exit_code, -9]),
        ("frozen, nobody to tell", [RankError.exit_code, -9]),
        ("frozen, stderr held up", [RankError.exit_code, -9]),
        ("no launcher", [RankError.exit_code, RankError.exit_code]),
        ("no launcher, one frozen", [RankError.exit_code, -9]),
    ],
)
def test_real_ranks(ends: dict[str, list[int]], scenario: str, codes: list[int]) -> None:
    """A rank that ends well or is busy is left alone; one killed or frozen takes the other with it."""
    if scenario == "no launcher":  # the first to leave may kill the second before it leaves itself
        assert set(ends[scenario]) <= {RankError.exit_code, -9}
    else:
        assert ends[scenario] == codes


def test_silence_is_counted_in_looks_without_a_sign() -> None:
    far = Peer(1, "elsewhere")
    for count in ("1", "2", "2", "2"):
        far.look(count)
    assert far.silent == 2
    far.look("3")
    assert far.silent == 0
    for _ in range(SILENT_LOOKS):
        far.look("3")
    assert far.silent == SILENT_LOOKS
    assert not far.is_gone(), "nothing is known of processes elsewhere"

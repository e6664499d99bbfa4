"""`lorakit verify --resume` on a real recipe, in processes of its own."""

import subprocess
import sys
from pathlib import Path

from tests.torture import runs


def test_a_resumed_run_is_shown_to_be_equal(tmp_path: Path) -> None:
    recipe = runs.make("llama", tmp_path / "given")
    words = ["verify", str(recipe), "--resume", "--set", "train.steps=5000", "--set", "train.evaluate_every=0"]
    done = subprocess.run(
        [sys.executable, "-m", "lorakit", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "equal, bit for bit" in done.stdout
    hashes = [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert len(hashes) == 6
    assert all(len(digest) == 64 for digest in hashes)
    assert hashes[0::2] == hashes[1::2]
    assert len(set(hashes)) == 3
    assert list((tmp_path / "runs").iterdir()) == []

"""What a run trains on, by name and hash, so that a resumed run can say which examples changed."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from lorakit.errors import shown
from lorakit.storage import atomic

NAMED = 3
"""How many examples are named of each kind of change."""

Row = tuple[str, str]
"""An example's name (a picture's file, or FILE:LINE) and the ``row_hash`` of what is trained on."""


def row_hash(*parts: bytes | str) -> str:
    """128 bits of SHA-256, in hex: a million examples take some 60 MB."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Fingerprint:
    """The examples of a run in their order, as often as each is taken."""

    train: Sequence[Row]
    held_out: Sequence[Row]

    @property
    def digest(self) -> str:
        """SHA-256 over the hashes. Names do not count: a blank line moves those below it and changes nothing."""
        hashes = (found for _, found in (*self.train, *self.held_out))
        return hashlib.sha256("\n".join([str(len(self.train)), *hashes]).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Keep it in a file; ResourceError when the disk refuses."""
        atomic.write_text(path, json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """What ``write`` wrote; OSError, ValueError, KeyError or TypeError for anything else."""
        found = json.loads(path.read_bytes())
        train, held_out = ([(str(name), str(row)) for name, row in found[key]] for key in ("train", "held_out"))
        return cls(train, held_out)

    def changes(self, now: "Fingerprint") -> str:
        """What was added, removed and altered until ``now``, in a few words.

        An example is altered when another stands under its name. One that only moved to another line is none of the
        three.
        """
        before, after = [*self.train, *self.held_out], [*now.train, *now.held_out]
        gone, come = _only_in(before, after), _only_in(after, before)
        kinds = {
            "added": [name for name in come if name not in gone],
            "removed": [name for name in gone if name not in come],
            "altered": [name for name in gone if name in come],
        }
        told = [f"{kind} {_listed(names)}" for kind, names in kinds.items() if names]
        return "; ".join(told) or "the same examples in another order, or taken more or less often"


def _only_in(rows: Sequence[Row], others: Sequence[Row]) -> dict[str, None]:
    """The names of the examples that ``rows`` has and ``others`` lacks, once each, in order."""
    left = Counter(found for _, found in rows) - Counter(found for _, found in others)
    known = set(others)
    names: dict[str, None] = {}
    for name, found in rows:
        if left[found] and (name, found) not in known:
            left[found] -= 1
            names[name] = None
    return names


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(shown, names[:NAMED])) + more

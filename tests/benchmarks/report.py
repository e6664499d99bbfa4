"""Tables, and RESULTS.md: each section between two marks is replaced by its newest figures, all else stays."""

import datetime
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks import machine

RESULTS = Path(__file__).parent / "RESULTS.md"
HEAD = "# Benchmarks\n\n`make bench` runs them; what stands between two marks is written by `--write`.\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, columns aligned."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return [line(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)]


def write(name: str, body: str, python: str) -> None:
    """Put ``body`` into the section ``name`` of RESULTS.md, with day, machine and versions."""
    start, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    made = f"{datetime.date.today().isoformat()}; {machine.describe()}; {machine.versions(python)}."
    section = f"{start}\n## {name}\n\n{body}\n\n{made}\n{end}"
    text = RESULTS.read_text() if RESULTS.exists() else HEAD
    if start in text:
        before, _, rest = text.partition(start)
        text = before + section + rest.partition(end)[2]
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    RESULTS.write_text(text)

"""The same sound input that the faults break, and a count of the cases each target took."""

from collections import Counter

import pytest

from tests.faults.conftest import cache, whole_llama, whole_sd

__all__ = ["cache", "whole_llama", "whole_sd"]
CASES: Counter[str] = Counter()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Cases a target, as ``make fuzz`` prints them."""
    if CASES:
        terminalreporter.section("fuzzed")
        for name, count in sorted(CASES.items()):
            terminalreporter.write_line(f"{count:8} {name}")
        terminalreporter.write_line(f"{sum(CASES.values()):8} cases in all")

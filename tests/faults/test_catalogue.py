"""Every number of the catalogue has a test that carries it."""

import ast
from collections import defaultdict
from pathlib import Path

from tests.faults.catalogue import FAULTS

TESTS = Path(__file__).parents[1]


def marks() -> dict[int, list[str]]:
    """Test ids by the numbers in their ``@pytest.mark.fault(N, ...)``, read from the source."""
    found = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                    for number in mark.args:
                        found[ast.literal_eval(number)].append(f"{path.relative_to(TESTS.parent)}::{node.name}")
    return dict(found)


def test_every_fault_has_a_test():
    found = marks()
    assert set(found) == set(FAULTS)


def test_names_agree_with_marks():
    carried = defaultdict(set)
    for number, tests in marks().items():
        for test in tests:
            carried[test].add(number)
    for test, numbers in carried.items():
        name = test.rpartition("::test_")[2].partition("_")[0]
        assert not name.isdigit() or int(name) in numbers, test

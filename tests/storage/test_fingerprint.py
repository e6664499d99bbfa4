import json
from pathlib import Path

import pytest

from lorakit.storage.fingerprint import Fingerprint, row_hash


def made(*rows: str, held_out: tuple[str, ...] = ()) -> Fingerprint:
    """Lines of a file: each row's name is the number of its line, its hash that of its text."""
    named = [(f"f:{n}", row_hash(text.encode())) for n, text in enumerate([*rows, *held_out], 1)]
    return Fingerprint(named[: len(rows)], named[len(rows) :])


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (["a", "b"], ["a", "b", "c"], "added f:3"),
        (["a", "b"], ["c", "a", "b"], "added f:1"),
        (["a", "b", "c"], ["a", "c"], "removed f:2"),
        (["a", "b", "c"], ["a", "x", "c"], "altered f:2"),
        (["a", "b", "b"], ["a", "b"], "removed f:3"),
        (["a", "b", "c"], ["y", "b", "c", "z"], "added f:4; altered f:1"),
        (["a", "b"], ["b", "a"], "the same examples in another order, or taken more or less often"),
        (["a"], list("abcdefg"), "added f:2, f:3, f:4 and 3 more"),
    ],
)
def test_what_changed_is_named(before: list[str], after: list[str], told: str) -> None:
    old, new = made(*before), made(*after)
    assert old.changes(new) == told
    assert old.digest != new.digest


def test_a_row_that_is_taken_twice_is_named_once() -> None:
    twice = Fingerprint([("a.png", "1"), ("a.png", "1"), ("b.png", "2")], [])
    assert twice.changes(Fingerprint([("a.png", "3"), ("a.png", "3"), ("b.png", "2")], [])) == "altered a.png"
    assert "more or less often" in twice.changes(Fingerprint([("a.png", "1"), ("b.png", "2")], []))


def test_names_do_not_count_but_the_split_does() -> None:
    assert made("a", "b").digest == Fingerprint([("g:7", row_hash(b"a")), ("g:9", row_hash(b"b"))], []).digest
    assert made("a", "b").digest != made("a", held_out=("b",)).digest
    assert row_hash(b"a", b"bc") != row_hash(b"ab", b"c")


def test_it_comes_back_from_its_file_and_stays_small(tmp_path: Path) -> None:
    many = made(*map(str, range(10_000)), held_out=("é\n",))
    many.write(tmp_path / "data.json")
    found = Fingerprint.read(tmp_path / "data.json")
    assert found == many
    assert (tmp_path / "data.json").stat().st_size < 60 * 10_001
    (tmp_path / "data.json").write_text(json.dumps({"train": 3}))
    with pytest.raises(TypeError):
        Fingerprint.read(tmp_path / "data.json")

import json
import os
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from lorakit.data.records import read_records
from lorakit.errors import DataError

ROWS = [{"text": "one"}, {"text": "zwei\nzeilen"}, {"text": "셋"}]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def jsonl(path):
    return write(path, "".join(json.dumps(row) + "\n" for row in ROWS))


def kinds(tmp_path):
    import datasets

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "split")
    return {
        jsonl(tmp_path / "a.jsonl"): [1, 2, 3],
        write(tmp_path / "list.json", json.dumps(ROWS, indent=1)): [2, 5, 8],
        write(tmp_path / "data.json", json.dumps({"version": "1", "data": ROWS}, indent=1)): [4, 7, 10],
        write(tmp_path / "a.csv", 'text\none\n"zwei\nzeilen"\n셋\n'): [2, 3, 5],
        str(tmp_path / "a.parquet"): [1, 2, 3],
        str(tmp_path / "one"): [1, 2, 3],
        str(tmp_path / "split"): [1, 2, 3],
    }


def test_every_kind_gives_the_same_rows_with_their_lines(tmp_path):
    for path, lines in kinds(tmp_path).items():
        records = list(read_records(path))
        assert [record.row for record in records] == ROWS, path
        assert [record.where for record in records] == [f"{path}:{line}" for line in lines]


BAD_JSONL = [
    ('{"a": 1}\n{"a": }\n{"a": 2}\n', 2, "bad JSON"),
    ('{"a": 1}\n[1, 2]\n', 2, "found list"),
    ('{"a": 1}\n\n{"a": "tru', 3, "truncated"),
    ("[" * 100_000 + "\n", 1, "nested"),
    ('{"a": 1,}', 1, "bad JSON"),
]


@pytest.mark.parametrize(("text", "line", "reason"), BAD_JSONL)
def test_jsonl_errors_name_their_line(tmp_path, text, line, reason):
    path = write(tmp_path / "bad.jsonl", text)
    with pytest.raises(DataError, match=reason) as caught:
        list(read_records(path))
    assert caught.value.where == f"{path}:{line}"


def test_the_other_kind_of_json_is_told(tmp_path):
    for name, text, kind in (("a.json", '{"a": 1}\n{"a": 2}\n', "jsonl"), ("a.jsonl", '[\n{"a": 1}\n]\n', "json")):
        with pytest.raises(DataError, match="bad JSON") as caught:
            list(read_records(write(tmp_path / name, text)))
        assert caught.value.hint.endswith(f"ends in .{kind}")


def test_a_path_may_begin_with_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl", '{"a": 1}\n')
    assert [record.row for record in read_records("~/a.jsonl")] == [{"a": 1}]


def test_bad_rows_are_handed_over_and_reading_goes_on(tmp_path):
    errors = []
    path = write(tmp_path / "bad.jsonl", BAD_JSONL[0][0])
    assert [r.row for r in read_records(path, on_bad=errors.append)] == [{"a": 1}, {"a": 2}]
    assert [error.where for error in errors] == [f"{path}:2"]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('[{"a": 1},\n {"a": 2},\n', 3, "truncated"),
        ('[{"a": 1},\n {"a": ?}]', 2, "bad JSON"),
        ('[{"a": 1},\n 3]', 2, "found int"),
        ('{"rows": []}', 1, "expected a list"),
        ("[] []", 1, "more text"),
        ('"word"', 1, "expected a list"),
        ("", 1, "truncated"),
    ],
)
def test_json_errors_name_their_line(tmp_path, text, line, reason):
    path = write(tmp_path / "bad.json", text)
    with pytest.raises(DataError, match=reason) as caught:
        list(read_records(path))
    assert caught.value.where == f"{path}:{line}"


def test_rows_of_one_line_have_names_of_their_own(tmp_path):
    path = write(tmp_path / "a.json", '[{"a": 1}, {"a": 2},\n{"a": 3}]')
    assert [where for _, where in read_records(path)] == [f"{path}:1", f"{path}:1 (item 2)", f"{path}:2"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_text_file_is_one_row_with_the_same_line_ends_everywhere(tmp_path, end):
    path = str(tmp_path / "a.txt")
    Path(path).write_bytes(f"\ufeffone{end}two".encode())
    assert list(read_records(path)) == [({"text": "one\ntwo"}, f"{path}:1")]


def test_a_folder_of_files_names_one_of_them(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", "{}")
    with pytest.raises(DataError, match="not made by") as caught:
        list(read_records(str(tmp_path)))
    assert str(tmp_path / "data" / "train.jsonl") in caught.value.hint


def test_csv_with_a_wrong_number_of_fields(tmp_path):
    path = write(tmp_path / "bad.csv", "a,b\n1,2\n1,2,3\n")
    with pytest.raises(DataError, match="3 fields under 2 columns") as caught:
        list(read_records(path))
    assert caught.value.where == f"{path}:3"


def test_corrupt_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(DataError, match="corrupt parquet") as caught:
        list(read_records(str(path)))
    assert caught.value.where == str(path)


def test_what_is_not_utf8(tmp_path):
    for name in ("a.jsonl", "a.json", "a.csv"):
        (tmp_path / name).write_bytes(b'{"a": "\xff"}\n')
        with pytest.raises(DataError, match=r"not UTF-8"):
            list(read_records(str(tmp_path / name)))


def test_refuses_urls_pipes_devices_and_unknown_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    cases = {
        "https://example.com/a.jsonl": "URLs",
        str(tmp_path / "pipe.jsonl"): "regular",
        "/dev/zero": "regular",
        write(tmp_path / "a.md", "x"): "no reader",
        str(tmp_path / "none.jsonl"): "no such",
        str(tmp_path): "save_to_disk",
    }
    for path, reason in cases.items():
        with pytest.raises(DataError, match=reason):
            list(read_records(path))


def test_control_characters_in_names_are_escaped(tmp_path):
    path = write(tmp_path / "red\x1b[31m\nname.jsonl", "x\n")
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    assert caught.value.where.endswith(r"red\x1b[31m\nname.jsonl:1")


def test_a_missing_split_is_named(tmp_path):
    path = next(p for p in kinds(tmp_path) if p.endswith("split"))
    with pytest.raises(DataError, match="no split 'test'"):
        list(read_records(path, split="test"))

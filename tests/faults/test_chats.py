"""Faults 11 and 17 to 23 in chats, by training and by ``lorakit data``."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from lorakit.data.records import read_records
from lorakit.errors import DataError
from tests.faults.conftest import row
from tests.faults.harness import Told, forked, lorakit, untouched

COMMANDS = ("train-llama", "data")


def refuse(folder: Path, *words: str, source: str | Path | None = None) -> Told:
    """Both commands that read chats refuse with exit code 3 and leave everything as it is."""
    changes = ["--set", f"data.train.0.path={source}"] if source else []
    for command in COMMANDS:
        with untouched(folder):
            told = lorakit(command, folder / "recipe.yaml", *changes).refused(3, *words)
    return told


def skipped(folder: Path, *words: str, rows: int = 7, source: str | Path | None = None) -> None:
    """With ``on_bad: skip`` the row is named, counted and left out, by training too."""
    name = f"skipped{len(list((folder / 'runs').glob('*')))}"
    changes = ["data.on_bad=skip", "train.steps=1", f"output.name={name}"]
    changes += [f"data.train.0.path={source}"] if source else []
    settings = [word for change in changes for word in ("--set", change)]
    trained = lorakit("train-llama", folder / "recipe.yaml", *settings)
    assert trained.code == 0, trained.err
    assert [word for word in ("skipped ", *words) if word not in trained.err.replace("\n", "")] == []
    told = lorakit("data", folder / "recipe.yaml", *settings)
    assert told.code == 0, told.err
    out = told.out.replace("\n", "")
    assert [word for word in (f"{rows} training rows", "skipped ", *words) if word not in out] == []


def with_line(folder: Path, number: int, line: str | bytes) -> None:
    lines = [row(i).encode() for i in range(8)]
    lines[number - 1] = line if isinstance(line, bytes) else line.encode()
    (folder / "chats.jsonl").write_bytes(b"".join(lines))


@pytest.mark.fault(11)
def test_11_nothing_there(llama: Path) -> None:
    (llama / "empty").mkdir()
    refuse(llama, f"{llama}/empty", "not made by datasets.save_to_disk", source=llama / "empty")
    refuse(llama, f"{llama}/none.jsonl", "no such file", source=llama / "none.jsonl")
    (llama / "chats.jsonl").write_text("\n\n")
    refuse(llama, f"{llama}/chats.jsonl", "there is no row in it")


MESSAGES = '{{"messages": [{{"role": "user", "content": "a"}}, {}]}}\n'


@pytest.mark.fault(17)
@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"messages": [}\n', "bad JSON: "),
        ('["a"]\n', "expected an object, found list"),
        ('{"messages": "a"}\n', "'messages' should be a list of objects"),
        ('{"messages": [["a"]]}\n', "'messages' should be a list of objects"),
        ('{"text": "a"}\n', "the field 'messages' is missing"),
        (MESSAGES.format('{"role": "assistant"}'), "the field 'content' is missing"),
        (MESSAGES.format('{"role": "assistant", "content": 3}'), "'content' should be text, is int"),
        (MESSAGES.format('{"role": "robot", "content": "b"}'), "unknown role 'robot'"),
        (MESSAGES.format('{"role": ["assistant"], "content": "b"}'), "'role' should be text, is list"),
        (b'{"messages": "\xff"}\n', "not UTF-8 at byte 14"),
        ("[" * 100_000 + "\n", "nested too deep"),
        ('{"messages": NaN}\n', "'messages' should be a list of objects"),
        ("9" * 10_000 + "\n", "too many digits"),
    ],
)
def test_17_a_bad_line(llama: Path, line: str | bytes, told: str) -> None:
    with_line(llama, 3, line)
    refuse(llama, f"{llama}/chats.jsonl:3", told)
    skipped(llama, "chats.jsonl:3")


@pytest.mark.fault(18)
def test_18_truncated_last_line(llama: Path) -> None:
    path = llama / "chats.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    refuse(llama, f"{path}:8", "the last line is truncated")
    skipped(llama, "chats.jsonl:8")
    whole = json.dumps([json.loads(row(i)) for i in range(4)], indent=1)
    (llama / "chats.json").write_text(whole[:-5])
    refuse(llama, "chats.json:", "truncated", source=llama / "chats.json")


@pytest.mark.fault(19)
def test_19_parquet(llama: Path) -> None:
    path = llama / "chats.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([json.loads(row(i)) for i in range(8)]), path)
    assert lorakit("data", llama / "recipe.yaml", "--set", f"data.train.0.path={path}").code == 0
    whole = path.read_bytes()
    for size in (0, 4, len(whole) // 2, len(whole) - 4):
        path.write_bytes(whole[:size])
        refuse(llama, f"{path}", "corrupt parquet", source=path)
    parquet.write_table(pyarrow.table({"a": [1]}), path)
    refuse(llama, f"{path}:1", "no known layout has the fields a", source=path)
    parquet.write_table(pyarrow.table({"messages": [1]}), path)
    refuse(llama, f"{path}:1", "'messages' should be a list", source=path)


@pytest.mark.fault(20, 9)
def test_20_urls_pipes_devices_and_loops(llama: Path) -> None:
    os.mkfifo(llama / "pipe.jsonl")
    (llama / "folder.jsonl").mkdir()
    for source, told in {
        "https://localhost/chats.jsonl": "URLs are not read",
        "file:///etc/passwd": "URLs are not read",
        f"{llama}/pipe.jsonl": "not a regular file",
        "/dev/zero": "not a regular file",
        f"{llama}/folder.jsonl": "not made by datasets.save_to_disk",
        f"{llama}/recipe.yaml": "no reader for files ending in '.yaml'",
    }.items():
        refuse(llama, source, told, source=source)
    (llama / "loop.jsonl").symlink_to("loop.jsonl")
    lorakit("train-llama", llama / "recipe.yaml", "--set", f"data.train.0.path={llama}/loop.jsonl").refused(2, "loop")


@pytest.mark.fault(20)
def test_20_a_datasets_folder_that_leads_elsewhere(llama: Path, edit) -> None:
    """The library would follow the file names in a data set's own JSON wherever they lead."""
    rows = [json.loads(row(i)) for i in range(8)]
    for name in ("ours", "secret"):
        datasets.Dataset.from_list(rows).save_to_disk(llama / name)
    state = llama / "ours/state.json"
    edit(state, _data_files=[{"filename": "../secret/data-00000-of-00001.arrow"}])
    refuse(llama, "ours", "outside the data set's folder", source=llama / "ours")
    edit(state, _data_files=[{"filename": "data-00000-of-00001.arrow"}])
    (llama / "ours/data-00000-of-00001.arrow").unlink()
    (llama / "ours/data-00000-of-00001.arrow").symlink_to("../../secret/data-00000-of-00001.arrow")
    refuse(llama, "ours", "outside the data set's folder", source=llama / "ours")
    (llama / "several").mkdir()
    (llama / "several/dataset_dict.json").write_text('{"splits": ["train", "../secret"]}')
    recipe = llama / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("chats.jsonl", "several, split: ../secret"))
    refuse(llama, "several", "outside the data set's folder")


@pytest.mark.fault(20)
@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "dataset_info.json"])
def test_20_a_pipe_in_a_datasets_folder(llama: Path, name: str) -> None:
    """The library would wait for somebody to write to it."""
    datasets.Dataset.from_list([json.loads(row(i)) for i in range(8)]).save_to_disk(llama / "ours")
    (llama / "ours" / name).unlink()
    os.mkfifo(llama / "ours" / name)
    told = forked("data", llama / "recipe.yaml", "--set", f"data.train.0.path={llama}/ours", seconds=20)
    told.refused(3, name, "not a regular file")


@pytest.mark.fault(21)
def test_21_a_datasets_folder_that_changes_while_it_is_read(llama: Path) -> None:
    """Its files are mapped into memory: one that is cut short would kill its reader (SIGBUS)."""
    datasets.Dataset.from_list([json.loads(row(i)) for i in range(8)]).save_to_disk(llama / "ours")
    rows = read_records(str(llama / "ours"))
    next(rows)
    os.truncate(llama / "ours/data-00000-of-00001.arrow", 0)
    with pytest.raises(DataError, match="changed while it was read") as caught:
        next(rows)
    assert caught.value.where.endswith("data-00000-of-00001.arrow")


@pytest.mark.fault(20)
def test_20_a_datasets_folder_never_opens_the_files_it_names(llama: Path) -> None:
    """A column of pictures by path or URL: the library opens or downloads each one when a row is read."""
    (llama / "pipe.png").touch()
    rows = [json.loads(row(i)) | {"picture": str(llama / "pipe.png")} for i in range(8)]
    made = datasets.Dataset.from_list(rows).cast_column("picture", datasets.Image())
    made.save_to_disk(llama / "pictured")
    (llama / "pipe.png").unlink()
    os.mkfifo(llama / "pipe.png")
    assert lorakit("data", llama / "recipe.yaml", "--set", f"data.train.0.path={llama}/pictured").code == 0


@pytest.mark.fault(21)
def test_21_a_file_that_changes_while_it_is_read(llama: Path) -> None:
    path = llama / "chats.jsonl"
    path.write_text("".join(row(i) for i in range(20_000)))
    size = path.stat().st_size
    # A process of its own: a thread would wait for the reader's hold on the interpreter.
    code = "import sys, time\nwhile True:\n    open(sys.argv[1], 'a').write(sys.argv[2])\n    time.sleep(0.001)"
    writer = subprocess.Popen([sys.executable, "-c", code, str(path), row(0)])
    try:
        while path.stat().st_size == size:
            time.sleep(0.01)
        told = lorakit("train-llama", llama / "recipe.yaml")
    finally:
        writer.kill()
        writer.wait()
    told.refused(3, str(path), "changed while it was read")


@pytest.mark.fault(22)
def test_22_all_labels_masked(llama: Path) -> None:
    with_line(llama, 5, '{"messages": [{"role": "user", "content": "only a question"}]}\n')
    refuse(llama, "chats.jsonl:5", "every label would be masked")
    skipped(llama, "chats.jsonl:5")
    unlearned = '{"role": "assistant", "content": "b", "weight": 0}'
    with_line(llama, 5, MESSAGES.format(unlearned))
    refuse(llama, "chats.jsonl:5", "every label would be masked")
    with_line(llama, 5, json.dumps({"messages": [{"role": "system", "content": "word " * 200},
                                                  *json.loads(row(1))["messages"]]}) + "\n")  # fmt: skip
    refuse(llama, "chats.jsonl:5", "no label is left")
    (llama / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n' * 8)
    done = lorakit("data", llama / "recipe.yaml", "--set", "data.on_bad=skip")
    done.refused(3, "data.train", "no row can be used")


@pytest.mark.fault(23)
def test_23_control_characters_in_names_and_rows(llama: Path) -> None:
    name = llama / "red\x1b[31m\nlorakit: error: forged.jsonl"
    name.write_text(
        '{"messages": [{"role": "\x1b]0;title\x07", "content": "a"}]}\n'.replace("\x1b", "\\u001b").replace(
            "\x07", "\\u0007"
        )
    )
    recipe = llama / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(f"{llama}/chats.jsonl", json.dumps(str(name))))
    refuse(llama, r"red\x1b[31m\nlorakit: error: forged.jsonl:1", "unknown role", r"\x1b]0;title\x07")

"""Finding pictures: every layout gives the same pictures, and whatever is wrong is named."""

import io
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lorakit.data.arrange import held_out_ids, survey
from lorakit.data.pictures import Picture, find_pictures
from lorakit.data.records import Rejects
from lorakit.errors import DataError
from lorakit.recipe.schema import PictureData

NAMES = {"a.png": "a red square", "b/c.jpg": "a blue square", "d.webp": "a green square"}


def png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


CONTENT = {name: png(i) for i, name in enumerate(NAMES)}


def folder(root: Path) -> Path:
    for name, data in CONTENT.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
        (root / name).with_suffix(".txt").write_text(NAMES[name] + "\n")
    return root


def with_metadata(root: Path) -> Path:
    for path in folder(root).rglob("*.txt"):
        path.unlink()
    (root / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": n, "text": t}) for n, t in NAMES.items()))
    return root


def test_pictures_that_a_table_does_not_name_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    find_pictures(PictureData(path=str(with_metadata(tmp_path))), Rejects("fail"))
    assert not caplog.text
    (tmp_path / "b/e.PNG").write_bytes(png(9))
    assert len(find_pictures(PictureData(path=str(tmp_path)), Rejects("fail"))) == 3
    assert "1 pictures are not named in" in caplog.text
    assert "metadata.jsonl, and left out: b/e.PNG" in caplog.text


def with_csv(root: Path) -> Path:
    (with_metadata(root) / "metadata.jsonl").unlink()
    (root / "metadata.csv").write_text("\n".join(["file_name,text", *(f'{n},"{t}"' for n, t in NAMES.items())]))
    return root


def rows() -> list[dict[str, object]]:
    return [{"image": {"bytes": CONTENT[n], "path": None}, "text": t} for n, t in NAMES.items()]


def parquet(root: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(rows()), root / "a.parquet", row_group_size=2)
    return root / "a.parquet"


def parquet_of_bytes(root: Path) -> Path:
    plain = [{"image": CONTENT[n], "text": t} for n, t in NAMES.items()]
    pq.write_table(pa.Table.from_pylist(plain), root / "a.parquet")
    return root / "a.parquet"


def saved(root: Path) -> Path:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_list(rows(), features=features).save_to_disk(root / "set")
    return root / "set"


def saved_splits(root: Path) -> Path:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    dataset = datasets.Dataset.from_list(rows(), features=features)
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(root / "set")
    return root / "set"


def find(path: Path, on_bad: str = "fail", **options: object) -> tuple[list[tuple[str, bytes]], Rejects]:
    data = PictureData(path=str(path), on_bad=on_bad, **options)
    rejects = Rejects(data.on_bad)
    return [(p.caption, p.read()) for p in find_pictures(data, rejects)], rejects


@pytest.mark.parametrize("make", [folder, with_metadata, with_csv, parquet, parquet_of_bytes, saved, saved_splits])
def test_every_layout_gives_the_same_pictures(make: Callable[[Path], Path], tmp_path: Path) -> None:
    found, _ = find(make(tmp_path))
    assert sorted(found) == sorted((NAMES[n], CONTENT[n]) for n in NAMES)


def test_a_captions_ending_may_be_in_capitals(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "a.txt").rename(tmp_path / "a.TXT")
    found, _ = find(tmp_path)
    assert sorted(found) == sorted((NAMES[n], CONTENT[n]) for n in NAMES)


def test_rows_are_read_in_any_order(tmp_path: Path) -> None:
    pictures = find_pictures(PictureData(path=str(parquet(tmp_path))), Rejects("fail"))
    assert [p.read() for p in reversed(pictures)] == list(reversed(CONTENT.values()))


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", tmp_path / "absent.parquet"):
        with pytest.raises(DataError):
            find(path)


def test_a_missing_caption_stops_or_is_listed(tmp_path: Path) -> None:
    (folder(tmp_path) / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.png: no caption: there is no a\.txt"):
        find(tmp_path)
    found, rejects = find(tmp_path, "skip")
    assert len(found) == 2
    assert [error.where for error in rejects.errors] == ["a.png"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"file_name": "a.png"', "truncated"),
        ('["a.png", "x"]', "expected an object"),
        ('{"file_name": "a.png", "label": "x"}', "no field 'text'; it has 'file_name', 'label'"),
        ('{"file_name": "a.png", "text": 3}', "not a text"),
        ('{"file_name": 7, "text": "x"}', "file_name"),
        ("\udcff\udcfe", "not UTF-8"),
        ("[" * 100_000, "nested too deep|truncated"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = with_metadata(tmp_path) / "metadata.jsonl"
    path.write_bytes(path.read_bytes() + b"\n" + line.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=reason) as caught:
        find(tmp_path)
    assert caught.value.where.endswith("/metadata.jsonl:4")
    found, rejects = find(tmp_path, "skip")
    assert (len(found), len(rejects.errors)) == (3, 1)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../secret.png", "outside"),
        ("link.png", "outside"),
        ("https://example.org/a.png", "URL"),
        ("file:///etc/hostname", "URL"),
        ("data:image/png;base64,AAAA", "URL"),
        ("pipe.png", "not a regular file"),
        ("b", "Is a directory"),
        ("absent.png", "No such file"),
        ("nul\0.png", "cannot be read"),
        ("loop.png", "cannot be read"),
    ],
)
def test_only_regular_files_of_the_folder_are_opened(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "secret.png").write_bytes(png(9))
    root = with_metadata(tmp_path / "set")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "loop.png").symlink_to("loop.png")
    os.mkfifo(root / "pipe.png")
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    with pytest.raises(DataError, match=reason) as caught:
        find(root)
    assert caught.value.where.endswith("/metadata.jsonl:1")
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": str(tmp_path / "secret.png"), "text": "x"}))
    with pytest.raises(DataError, match="outside"):
        find(root)


def test_links_and_pipes_in_a_plain_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(9))
    (tmp_path / "secret.txt").write_text("secret")
    root = folder(tmp_path / "set")
    (root / "e.png").symlink_to(tmp_path / "secret.png")
    (root / "e.txt").write_text("linked picture")
    with pytest.raises(DataError, match="outside"):
        find(root)
    (root / "e.png").unlink()
    (root / "e.png").write_bytes(png(3))
    (root / "e.txt").unlink()
    (root / "e.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(DataError, match="outside"):
        find(root)
    (root / "e.txt").unlink()
    (tmp_path / "more").mkdir()
    (root / "linked").symlink_to(tmp_path / "more")
    with pytest.raises(DataError, match="linked: a link to a folder, which is not followed"):
        find(root)
    (root / "linked").unlink()
    os.mkfifo(root / "e.txt")
    with pytest.raises(DataError, match="not a regular file"):
        find(root)


def test_a_path_in_a_table_stays_inside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(9))
    root = folder(tmp_path / "set")
    for value, reason in (("a.png", None), ("../secret.png", "outside"), (str(tmp_path / "secret.png"), "outside")):
        table = pa.Table.from_pylist([{"image": {"bytes": None, "path": value}, "text": "x"}])
        pq.write_table(table, root / "a.parquet")
        if reason is None:
            assert find(root / "a.parquet")[0] == [("x", CONTENT["a.png"])]
        else:
            with pytest.raises(DataError, match=reason):
                find(root / "a.parquet")


def test_a_damaged_parquet_file_and_a_missing_column(tmp_path: Path) -> None:
    path = parquet(tmp_path)
    with pytest.raises(DataError, match="no column 'caption'; it has 'image', 'text'"):
        find(path, caption_column="caption")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="not a sound parquet file"):
        find(path)


def test_a_missing_split_and_a_damaged_datasets_folder(tmp_path: Path) -> None:
    path = saved_splits(tmp_path)
    with pytest.raises(DataError, match="no split 'valid'; it has train, test"):
        find(path, split="valid")
    assert len(find(path, split="test")[0]) == 1
    next((path / "train").glob("*.arrow")).write_bytes(b"junk")
    with pytest.raises(DataError, match="the data set cannot be read"):
        find(path)


def test_control_characters_in_names_are_escaped(tmp_path: Path) -> None:
    (folder(tmp_path) / "x\x1b[31m\n.png").write_bytes(png(4))
    with pytest.raises(DataError) as caught:
        find(tmp_path)
    assert caught.value.where == "x\\x1b[31m\\n.png"


def test_a_number_before_a_folders_name_is_told_to_be_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder(tmp_path / "10_cat")
    assert len(find_pictures(PictureData(path=str(tmp_path)), Rejects("fail"))) == len(NAMES)
    assert "10_cat: the number is no repeat count" in caplog.text


def test_kohyas_folders_say_how_often_a_picture_comes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("10_cat", "2_dog/deep", "2020", "plain"):
        folder(tmp_path / name)
    data = PictureData(path=str(tmp_path), repeats="folders", held_out=0)
    found = survey(data, [(32, 32)], 0, lambda _: (40, 40))
    assert found.examples == {(32, 32): 3 * (10 + 2 + 1 + 1)}
    assert "repeat" not in caplog.text
    inside = data.model_copy(update={"path": str(tmp_path / "10_cat")})
    assert survey(inside, [(32, 32)], 0, lambda _: (40, 40)).examples == {(32, 32): 3 * 10}
    rows = [
        {"file_name": f"10_cat/{next(iter(NAMES))}", "text": "a"},
        {"file_name": f"plain/{next(iter(NAMES))}", "text": "b"},
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert survey(data, [(32, 32)], 0, lambda _: (40, 40)).examples == {(32, 32): 10 + 1}


def test_of_a_few_pictures_none_is_held_out_unasked() -> None:
    pictures = [Picture(str(number), "", bytes) for number in range(30)]
    assert [len(held_out_ids(pictures[:count], 0.05, 0)) for count in (2, 5, 10, 11, 30)] == [0, 0, 0, 1, 2]
    assert len(held_out_ids(pictures[:4], 0.25, 0)) == 1
    assert len(held_out_ids(pictures[:2], 0.9, 0)) == 1


def test_masks_are_no_pictures_and_lines_of_a_caption_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = folder(tmp_path)
    for name in ("a-masklabel.png", "a-condlabel.png"):
        (root / name).write_bytes(b"x")
    (root / "a.txt").unlink()
    (root / "a.caption").write_text("one\ntwo\n")
    found = {picture.id: picture.caption for picture in find_pictures(PictureData(path=str(root)), Rejects("fail"))}
    assert found.keys() == set(NAMES)
    assert "one two" in found.values()
    assert "2 masks" in caplog.text
    assert "1 captions have several lines" in caplog.text


def test_what_other_trainers_keep_beside_a_picture_is_none(tmp_path: Path) -> None:
    folder(tmp_path)
    for suffix in (".npz", ".caption", ".safetensors"):
        (tmp_path / f"a{suffix}").write_bytes(b"x")
    assert {p.id for p in find_pictures(PictureData(path=str(tmp_path)), Rejects("fail"))} == set(NAMES)


@pytest.mark.parametrize("captions", [2, 5])
def test_a_picture_with_several_captions_is_set_aside_once(captions: int) -> None:
    pictures = [Picture(name, str(i), bytes) for name in NAMES for i in range(captions)]
    assert len(held_out_ids(pictures, 0.4, 0)) == 1
    assert held_out_ids(pictures[:captions], 0.4, 0) == set()


def test_other_files_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder(tmp_path)
    (root / "README.md").write_text("about")
    (root / ".hidden.png").write_bytes(b"x")
    (root / "notes.txt").write_text("no picture")
    with caplog.at_level(logging.WARNING):
        assert len(find(root)[0]) == 3


def test_a_path_where_nothing_is_is_told_apart_from_one_of_another_kind(tmp_path):
    (tmp_path / "a.zip").touch()
    for name, said in (("a.zip", "neither a folder nor"), ("a/b/absent", "no such file or folder")):
        with pytest.raises(DataError, match=said) as caught:
            find_pictures(PictureData(path=str(tmp_path / name)), Rejects("fail"))
        assert caught.value.where == str(tmp_path / name)

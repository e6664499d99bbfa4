"""What the command asks for before any model is loaded, and what it never overwrites."""

import json
from pathlib import Path

import pytest

from lorakit.commands.adapters import parse_adapter
from lorakit.commands.generate import Request, run
from lorakit.errors import ConflictError, DataError, RecipeError, ResourceError
from lorakit.families.sd.pictures import read_settings
from tests.tiny import tiny_llama, tiny_sd

LLAMA = {
    "quantization": "none",
    "raw": False,
    "system": None,
    "chat_template": None,
    "temperature": 0.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "max_new_tokens": 3,
}
SD = {
    "negative_prompt": "",
    "steps": 2,
    "guidance_scale": 2.0,
    "width": None,
    "height": None,
    "count": 1,
    "scheduler": "ddim",
}


def request(
    base: Path, out: Path | None = None, prompts: tuple[str, ...] = ("a",), file: Path | None = None
) -> Request:
    return Request(
        base=str(base),
        revision=None,
        adapters=(),
        prompts=prompts,
        prompts_file=file,
        out=out,
        device="cpu",
        precision="fp32",
        seed=0,
    )


def test_an_adapter_may_carry_a_weight(tmp_path: Path) -> None:
    odd = tmp_path / "v1:2"
    odd.mkdir()
    assert parse_adapter(str(odd)) == (odd, 1.0)
    assert parse_adapter(f"{odd}:0.5") == (odd, 0.5)
    with pytest.raises(RecipeError, match="no such adapter"):
        parse_adapter(str(tmp_path / "absent"))
    with pytest.raises(RecipeError, match="is not a weight"):
        parse_adapter(f"{odd}:heavy")
    with pytest.raises(RecipeError, match="'nan' is not a weight"):
        parse_adapter(f"{odd}:nan")


def test_prompts_are_asked_for_and_read_as_utf8(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no prompt"):
        run(request(tmp_path, prompts=()), sd=SD, llama=LLAMA)
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read"):
        run(request(tmp_path, prompts=(), file=tmp_path / "p.txt"), sd=SD, llama=LLAMA)


@pytest.mark.fault(66)
def test_answers_go_to_a_file_that_did_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = tiny_llama(tmp_path / "base"), tmp_path / "in" / "a folder" / "answers.jsonl"
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(DataError, match=r"p\.jsonl:2: there is no text in the field 'prompt'"):
        run(request(tmp_path, prompts=(), file=tmp_path / "p.jsonl"), sd=SD, llama=LLAMA)
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n", encoding="utf-8-sig")
    run(request(base, out, (), tmp_path / "prompts.txt"), sd=SD, llama=LLAMA)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["one", "two"]
    assert rows[0]["answer"] in capsys.readouterr().out
    with pytest.raises(ConflictError):
        run(request(base, out), sd=SD, llama=LLAMA)


@pytest.mark.fault(66)
def test_one_picture_goes_to_the_file_that_out_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = tiny_sd(tmp_path / "base"), tmp_path / "in" / "cat.PNG"
    run(request(base, out, ("a",)), sd=SD, llama=LLAMA)
    assert read_settings(out)["prompt"] == "a"  # type: ignore[index]
    assert [path.name for path in out.parent.iterdir()] == ["cat.PNG"]
    assert str(out) in capsys.readouterr().out
    before = out.read_bytes()
    with pytest.raises(ConflictError, match="exists already"):
        run(request(base, out, ("b",)), sd=SD, llama=LLAMA)
    assert out.read_bytes() == before
    for prompts, more in ((("a", "b"), {}), (("a",), {"count": 2})):
        with pytest.raises(RecipeError, match="one file for 2 pictures"):
            run(request(base, tmp_path / "two.png", prompts), sd=SD | more, llama=LLAMA)
    with pytest.raises(RecipeError, match="written as PNG"):
        run(request(base, tmp_path / "cat.jpg", ("a",)), sd=SD, llama=LLAMA)
    assert not (tmp_path / "two.png").exists()
    (tmp_path / "folder.png").mkdir()
    run(request(base, tmp_path / "folder.png", ("a", "b")), sd=SD, llama=LLAMA)
    assert len(list((tmp_path / "folder.png").iterdir())) == 3


@pytest.mark.fault(65)
def test_pictures_are_numbered_on_and_never_named_by_their_prompt(tmp_path: Path) -> None:
    base, out = tiny_sd(tmp_path / "base"), tmp_path / "out"
    run(request(base, out, ("../../a", "b")), sd=SD, llama=LLAMA)
    first = (out / "0001.png").read_bytes()
    run(request(base, out, ("c",)), sd=SD, llama=LLAMA)
    assert sorted(p.name for p in out.iterdir()) == ["0001.png", "0002.png", "0003.png", "grid-0001.png"]
    assert read_settings(out / "0001.png")["precision"] == "float32"  # type: ignore[index]
    assert (out / "0001.png").read_bytes() == first
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(ConflictError):
        run(request(base, tmp_path / "link"), sd=SD, llama=LLAMA)


@pytest.mark.parametrize("place", ["file/x", "link/x", "n" * 300], ids=["a file", "a dead link", "too long"])
def test_a_place_that_cannot_be(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llama, sd = tiny_llama(tmp_path / "llama"), tiny_sd(tmp_path / "sd")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.setattr("lorakit.families.llama.generate.open_chat", None)  # nothing is loaded before it is seen
    for base, out in ((llama, tmp_path / f"{place}.jsonl"), (sd, tmp_path / place)):
        with pytest.raises(ResourceError, match="cannot be written") as caught:
            run(request(base, out), sd=SD, llama=LLAMA)
        assert caught.value.where == str(out)


@pytest.mark.parametrize("option", ["prompt", "system", "negative-prompt"])
def test_texts_that_are_not_utf8(tmp_path: Path, option: str) -> None:
    broken = b"caf\xe9".decode(errors="surrogateescape")
    prompts = (broken,) if option == "prompt" else ("a",)
    sd = SD | ({"negative_prompt": broken} if option == "negative-prompt" else {})
    llama = LLAMA | ({"system": broken} if option == "system" else {})
    with pytest.raises(RecipeError, match="not UTF-8") as caught:
        run(request(tmp_path, prompts=prompts), sd=sd, llama=llama)
    assert caught.value.where == f"--{option}"

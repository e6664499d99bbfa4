"""``lorakit data`` shows what is learned of each row, and how rows and pictures are spread."""

import json
import re
from io import StringIO
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from lorakit.commands import data
from lorakit.data.show import Piece, ShownRow
from lorakit.errors import DataError, ModelError
from tests.tiny import tiny_llama, tiny_sd


def row(*pieces):
    return ShownRow("chats.jsonl:1", tuple(Piece(*piece) for piece in pieces), len(pieces), 0, 0)


def test_learned_and_masked_pieces_have_different_colours():
    shown = row(("What? ", False), ("That", True), (".", True), ("\n", False))
    text = data.painted(shown, marks=False)
    assert text.plain == "What? That.⏎\n"
    styles = [(text.plain[span.start : span.end], span.style) for span in text.spans]
    assert styles == [("What? ", "dim"), ("That", "bold green"), (".", "bold green"), ("⏎\n", "dim")]
    out = StringIO()
    Console(file=out, force_terminal=True, color_system="standard").print(text)
    assert "\x1b[1;32mThat" in out.getvalue()
    assert "\x1b[2mWhat? " in out.getvalue()


def test_without_colours_learned_runs_are_in_brackets():
    shown = row(("a", False), ("b", True), ("c", True), ("d", False), ("e", True))
    assert data.painted(shown, marks=True).plain == "a⟦bc⟧d⟦e⟧"


def test_data_cannot_steer_the_terminal():
    assert data.visible("a\x1b[31m\nb\x07\u202e") == "a\\x1b[31m⏎b\\x07\\u202e"
    assert data.painted(row(("[red]x[/]\x1b", False)), marks=False).plain == "[red]x[/]\\x1b"


def test_shown_items_are_spread_over_the_whole():
    assert data.spread(range(10), 4) == [0, 2, 5, 7]
    assert data.spread(range(3), 9) == [0, 1, 2]
    assert data.spread([], 3) == []


def test_bars_are_in_proportion(capsys):
    data.histogram(Console(), "tokens", [("1 to 9", 80), ("10 to 18", 1), ("19 to 27", 0), ("28 to 36", 40)])
    lengths = [line.count("█") for line in capsys.readouterr().out.splitlines()]
    assert lengths == [0, 40, 1, 0, 20]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def test_chats_are_shown_as_the_model_sees_them(here, capsys):
    tiny_llama(here / "base")
    rows = [{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": f"I am number {n}."}]}
            for n in range(20)]  # fmt: skip
    (here / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (here / "r.yaml").write_text("base: {model: base}\ndata: {train: [{path: chats.jsonl}], held_out: 0.1}\n")
    data.run(Path("r.yaml"), ["data.max_tokens=64"], 3)
    out = capsys.readouterr().out
    assert len(re.findall(r"^chats.jsonl:\d+: \d+ tokens, \d+ learned", out, re.MULTILINE)) == 3
    found = re.findall(r"<\|im_start\|>user⏎\nHello<\|im_end\|>⏎\n<\|im_start\|>assistant⏎\n⟦(.*?)⟧", out)
    assert len(found) == 3
    assert all(re.fullmatch(r"I am number \d+\.<\|im_end\|>", answer) for answer in found)
    assert "18 training rows" in out
    assert "2 held out" in out


def test_a_recipe_for_a_machine_with_a_gpu(here, capsys):
    tiny_llama(here / "base")
    (here / "chats.jsonl").write_text('{"text": "words"}\n')
    (here / "r.yaml").write_text(
        "base: {model: base}\ndata: {train: [{path: chats.jsonl}], held_out: 0, max_tokens: 64}\n"
    )
    for precision in ("fp16", "auto"):
        data.run(Path("r.yaml"), ["compute.device=cuda", f"compute.precision={precision}"], 1)
        assert "1 training rows" in capsys.readouterr().out


def test_pictures_are_shown_with_their_captions_and_buckets(here, capsys):
    tiny_sd(here / "base")
    (here / "pictures").mkdir()
    for n in range(5):
        Image.new("RGB", (128, 64) if n % 2 else (64, 64), (n, 0, 0)).save(here / "pictures" / f"{n}.png")
        (here / "pictures" / f"{n}.txt").write_text(f"thing {n}, [red]\x1b")
    text = (
        "base: {model: base}\n"
        "data: {path: pictures, resolution: 64, bucket_step: 16, held_out: 0, flip: true, repeats: 3, trigger: tok}\n"
    )
    (here / "r.yaml").write_text(text)
    data.run(Path("r.yaml"), [], 5)
    out = capsys.readouterr().out
    assert "0.png: 64 x 64 -> 64 x 64 pixels" in out
    assert "  tok, thing 0, [red]\\x1b" in out
    bars = dict(re.findall(r"^ *(\d+ x \d+) █+ (\d+)$", out, re.MULTILINE))
    assert bars["64 x 64"] == "18"
    assert sum(int(count) for count in bars.values()) == 30
    assert len(bars) == 2
    assert "30 examples an epoch from 5 pictures; 0 held out" in out


def test_bad_pictures_stop_or_are_listed(here, capsys):
    tiny_sd(here / "base")
    (here / "pictures").mkdir()
    Image.new("RGB", (64, 64)).save(here / "pictures" / "good.png")
    (here / "pictures" / "bad.png").write_bytes(b"not a picture")
    for name in ("good", "bad"):
        (here / "pictures" / f"{name}.txt").write_text(name)
    (here / "r.yaml").write_text("base: {model: base}\ndata: {path: pictures, resolution: 64, bucket_step: 16}\n")
    with pytest.raises(DataError, match=r"bad\.png"):
        data.run(Path("r.yaml"), [], 5)
    data.run(Path("r.yaml"), ["data.on_bad=skip"], 5)
    assert re.search(r"left out: .*bad\.png", capsys.readouterr().out)


def test_a_base_of_the_other_family_is_told(here):
    tiny_sd(here / "sd")
    tiny_llama(here / "llama")
    (here / "chats.jsonl").write_text('{"text": "words"}\n')
    (here / "l.yaml").write_text("base: {model: sd}\ndata: {train: [{path: chats.jsonl}]}\n")
    (here / "s.yaml").write_text("base: {model: llama}\ndata: {path: pictures}\n")
    for name in ("l.yaml", "s.yaml"):
        with pytest.raises(ModelError, match=r"base\.model"):
            data.run(Path(name), [], 1)

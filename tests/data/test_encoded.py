"""Rows that were encoded once come back from the cache as they were, and only where nothing has changed."""

import json
from pathlib import Path

import numpy as np
import pytest

from lorakit.data.chat_set import ChatSet, load_chats
from lorakit.errors import DataError
from lorakit.recipe.schema import ChatData
from tests.tiny import CHATML, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


class Asked:
    """A tokenizer, and how often it was asked for."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> object:
        self.times += 1
        return TOKENIZER


def turn(role: str, content: str, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    chats = [[turn("user", f"q {n}"), turn("assistant", f"answer {n}")] for n in range(9)]
    chats.append([turn("user", "long " * 40), turn("assistant", "a"), turn("user", "b"), turn("assistant", "c")])
    lines = [{"messages": messages} for messages in chats]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "plain " * 60}) + "\n")
    return tmp_path


def load(rows: Path, tokenizer: Asked, seed: int = 0, identity: str = "tiny", **options: object) -> ChatSet:
    sources = [{"path": str(rows / "chats.jsonl"), "weight": 2}, {"path": str(rows / "texts.jsonl")}]
    options = {"train": sources, "held_out": 0.2, "max_tokens": 40, **options}
    return load_chats(ChatData.model_validate(options), tokenizer, seed, identity)


def same(one: ChatSet, other: ChatSet) -> bool:
    def told(chats: ChatSet) -> list[tuple[object, ...]]:
        listed = [*chats.train, *chats.held_out]
        return [(r.tokens.tolist(), r.labels.tolist(), r.where, r.cut, r.alone, r.count) for r in listed]

    return told(one) == told(other) and one.notes() == other.notes() and one.fingerprint() == other.fingerprint()


def test_the_second_time_no_tokenizer_is_asked(rows: Path) -> None:
    asked = Asked()
    first = load(rows, asked)
    again = load(rows, asked)
    assert asked.times == 1
    assert same(first, again)
    assert first.cut[0] > 0
    assert {row.tokens.dtype for row in again.train} == {np.dtype(np.int32)}
    load(rows, asked, seed=1, held_out=0.5)
    assert asked.times == 1  # the same rows, split otherwise


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 41},
        {"chat_template": "chatml"},
        {"identity": "another"},
        {"train": [{"path": "texts.jsonl"}], "held_out": 0},
    ],
)
def test_whatever_rows_depend_on_is_in_the_key(
    rows: Path, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(rows)
    load(rows, Asked())
    asked = Asked()
    load(rows, asked, **options)
    assert asked.times == 1


def test_a_template_of_ones_own_is_known_by_what_it_says(rows: Path) -> None:
    template, asked = rows / "own.jinja", Asked()
    for source in (CHATML, CHATML, CHATML.replace("|im_start|", "|im_end|")):
        template.write_text(source)
        load(rows, asked, chat_template=str(template))
    assert asked.times == 2


def test_answers_alone_are_told_each_time(rows: Path) -> None:
    template = rows / "last.jinja"
    template.write_text("{% for m in messages %}{{ m['role'][:loop.length - loop.index0] + m['content'] }}{% endfor %}")
    messages = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    (rows / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    asked = Asked()
    first, again = (load(rows, asked, held_out=0, chat_template=str(template)) for _ in range(2))
    assert asked.times == 1
    assert same(first, again)
    assert sum(row.alone for row in again.train) == 2  # weight 2
    assert "2 earlier answers are rows of their own: the chat template rewrites them later in a chat" in again.notes()


def test_what_is_learned_is_in_the_key(rows: Path) -> None:
    asked, counts = Asked(), []
    for weight in (1, 0):
        messages = [turn("user", "a"), turn("assistant", "b", weight=weight), turn("user", "c"), turn("assistant", "d")]
        (rows / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
        counts.append(sum(row.count for row in load(rows, asked, held_out=0).train))
    assert asked.times == 2
    assert counts[0] > counts[1]


def test_thoughts_are_in_the_key(rows: Path) -> None:
    template, asked, tokens = rows / "thinks.jinja", Asked(), []
    template.write_text("{% for m in messages %}{{ m.reasoning_content or '' }}{{ m['content'] }}{% endfor %}")
    for thought in ("one", "two", None):
        messages = [turn("user", "a"), turn("assistant", "b", reasoning_content=thought)]
        (rows / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
        found = load(rows, asked, held_out=0, chat_template=str(template)).train
        tokens.append(sorted(row.tokens.tolist() for row in found))
    assert asked.times == 3
    assert tokens[0] != tokens[1] != tokens[2] != tokens[0]


def test_who_says_something_is_in_the_key(rows: Path) -> None:
    asked, tokens = Asked(), []
    for role in ("system", "user"):
        messages = [turn(role, "a"), turn("user", "b"), turn("assistant", "c")]
        (rows / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
        tokens.append(sorted(row.tokens.tolist() for row in load(rows, asked, held_out=0).train))
    assert asked.times == 2
    assert tokens[0] != tokens[1]


def test_bad_rows_are_told_each_time(rows: Path) -> None:
    bad = {"messages": [turn("user", "a"), turn("assistant", "<|im_end|>")]}
    with (rows / "chats.jsonl").open("a") as file:
        file.write(2 * (json.dumps(bad) + "\n"))
    asked = Asked()
    first, again = (load(rows, asked, on_bad="skip") for _ in range(2))
    places = {f"{rows}/chats.jsonl:{line}" for line in (11, 12)}
    assert {error.where for error in first.skipped} == {error.where for error in again.skipped} == places
    assert same(first, again)
    with pytest.raises(DataError, match="special token"):
        load(rows, asked)


def test_a_damaged_entry_is_made_anew(rows: Path, cache: Path) -> None:
    asked = Asked()
    first = load(rows, asked)
    (entry,) = cache.rglob("*.safetensors")
    content = bytearray(entry.read_bytes())
    content[-1] ^= 1
    entry.write_bytes(content)
    assert same(load(rows, asked), first)
    assert asked.times == 2


def test_a_cache_that_cannot_be_written_costs_time_only(
    rows: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = load(rows, Asked())
    for entry in cache.rglob("*.safetensors"):
        entry.unlink()
    (cache / "rows").rename(cache / "aside")
    (cache / "rows").write_text("in the way")
    assert same(load(rows, Asked()), first)
    assert "the cache cannot be written" in caplog.text

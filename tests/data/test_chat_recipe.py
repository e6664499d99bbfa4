"""The chats of recipes/python-help: made twice alike, nothing said twice, held-out questions apart."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.data.chat import parse, tell
from lorakit.data.records import read_records
from lorakit.recipe.load import load
from lorakit.recipe.schema import LlamaRecipe

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "python-help" / "make_chats.py"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = [tmp_path_factory.mktemp(name) for name in ("a", "b")]
    for folder in made:
        subprocess.run([sys.executable, str(SCRIPT), str(folder)], check=True, capture_output=True)
    return made


def rows(path):
    chats = [parse(record, tell(record)) for record in read_records(str(path))]
    return [(chat.messages[0].content, chat.messages[1].content) for chat in chats]


def test_the_same_python_gives_the_same_files(folders):
    for name in ("python-help.jsonl", "python-help-held-out.jsonl"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_thousands_of_chats_and_no_answer_twice(folders):
    train, held_out = rows(folders[0] / "python-help.jsonl"), rows(folders[0] / "python-help-held-out.jsonl")
    assert len(train) > 2500
    assert len(held_out) == 96
    answers = [answer.lower() for _, answer in train + held_out]
    assert len(set(answers)) == len(answers)
    assert len({question for question, _ in train + held_out}) == len(answers)
    for answer in answers:
        assert 20 <= len(answer) <= 601
        assert "\n" not in answer
        assert "<" not in answer


def test_what_the_samples_ask_is_held_out(folders):
    text = (folders[0] / "python-help.jsonl").read_text()
    asked = [question for question, _ in rows(folders[0] / "python-help-held-out.jsonl")]
    prompts = load(ROOT / "recipes/python-help.yaml", LlamaRecipe, []).sample.prompts
    assert len(prompts) == 4
    for prompt in prompts:
        assert prompt in asked
        assert json.dumps(prompt) not in text

"""What the tests of recipes share."""

from pathlib import Path

import pytest

from lorakit.errors import RecipeError
from lorakit.recipe.load import load
from lorakit.recipe.schema import SDRecipe

SD = "data: {path: pictures}\n"
LLAMA = "data:\n  train:\n    - path: chats.jsonl\n"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Write a text (or bytes) as r.yaml in an empty working folder, and load it."""
    monkeypatch.chdir(tmp_path)

    def write(text, kind=SDRecipe, *overrides):
        Path("r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return load(Path("r.yaml"), kind, overrides)

    return write


def faults(recipe, text, kind=SDRecipe, *overrides):
    with pytest.raises(RecipeError) as caught:
        recipe(text, kind, *overrides)
    assert caught.value.exit_code == 2
    return list(caught.value.details) or [str(caught.value)]

"""Every recipe in the repository loads, as the family its base belongs to."""

from pathlib import Path

import pytest

from lorakit.recipe.load import dump, load, load_any
from lorakit.recipe.schema import LlamaRecipe, SDRecipe

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
BUILT_IN = {"builtin:mini-sd": SDRecipe, "builtin:smollm2-135m": LlamaRecipe}


def test_there_are_recipes_of_both_families():
    kinds = {type(load_any(path)) for path in RECIPES}
    assert kinds == {SDRecipe, LlamaRecipe}


@pytest.mark.parametrize("path", RECIPES, ids=[path.relative_to(ROOT).as_posix() for path in RECIPES])
def test_a_recipe_loads_and_reads_back_equal(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = load_any(path)
    if recipe.base.model in BUILT_IN:
        assert type(recipe) is BUILT_IN[recipe.base.model]
    (tmp_path / "again.yaml").write_text(dump(recipe))
    assert load(tmp_path / "again.yaml", type(recipe)) == recipe

"""``lorakit init`` writes a recipe that loads, and never over a file."""

import os

import pytest

from lorakit.commands.init import init
from lorakit.errors import ConflictError, ResourceError
from lorakit.recipe.load import load_any
from lorakit.recipe.schema import LlamaRecipe, SDRecipe


@pytest.mark.parametrize(("family", "kind"), [("sd", SDRecipe), ("llama", LlamaRecipe)])
def test_it_writes_a_recipe_of_the_family(tmp_path, family, kind):
    path = init(family, tmp_path / "mine.yaml")
    assert path == tmp_path / "mine.yaml"
    assert isinstance(load_any(path), kind)


def test_it_leaves_an_existing_file_alone(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("precious")
    with pytest.raises(ConflictError, match=r"mine\.yaml: exists already"):
        init("sd", path)
    assert path.read_text() == "precious"
    os.symlink(tmp_path / "elsewhere", tmp_path / "link.yaml")
    with pytest.raises(ConflictError):
        init("sd", tmp_path / "link.yaml")
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ResourceError, match="cannot be written"):
        init("sd", tmp_path / "no" / "mine.yaml")

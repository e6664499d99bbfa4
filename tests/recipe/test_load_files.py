"""Recipes and the file system: what may be read, and where a run folder may stand."""

import os
from pathlib import Path

import pytest

from lorakit.errors import RecipeError
from lorakit.recipe.load import load
from lorakit.recipe.schema import LlamaRecipe, SDRecipe
from tests.recipe.conftest import SD, faults


def test_a_run_folder_inside_the_data_or_the_base_is_refused(recipe, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "link").symlink_to("pictures")
    (line,) = faults(recipe, SD + "output:\n  folder: link/runs\n")
    assert line.startswith("r.yaml:3:11 output.folder: the run folder link/runs/run would be inside data.path")
    (line,) = faults(recipe, SD + "output: {folder: ., name: pictures}\n")
    assert "inside data.path" in line
    (line,) = faults(recipe, "data: {path: elsewhere}\nbase: {model: .}\n")
    assert line.startswith("r.yaml output.folder: the run folder runs/run would be inside base.model")
    (line,) = faults(
        recipe, "data:\n  train: [{path: x}]\n  held_out: [{path: link}]\n", LlamaRecipe, "output.folder=link"
    )
    assert line.startswith("--set output.folder: the run folder link/run would be inside data.held_out.0.path")
    assert recipe(SD + "output: {folder: pictures2}\n").output.folder == Path("pictures2")


def test_a_loop_of_symbolic_links_is_told(recipe, tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (line,) = faults(recipe, "data: {path: a/pictures}\n")
    assert line == "r.yaml:1:14 data.path: a is a symbolic link that leads to itself"
    (line,) = faults(recipe, SD + "output: {folder: b}\n")
    assert line == "r.yaml:2:18 output.folder: b is a symbolic link that leads to itself"
    with pytest.raises(RecipeError, match="cannot be read"):
        load(tmp_path / "a", SDRecipe)


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, reason in (
        (tmp_path, "not a file"),
        (tmp_path / "fifo", "not a file"),
        (tmp_path / "no", "no such file"),
    ):
        with pytest.raises(RecipeError, match=reason):
            load(path, SDRecipe)
    with pytest.raises(RecipeError, match="cannot be read"):
        load(Path("a\0b"), SDRecipe)

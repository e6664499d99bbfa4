"""The starting recipes are whole, explained, and load."""

import pytest

from lorakit.recipe.build import sections
from lorakit.recipe.load import load
from lorakit.recipe.schema import LlamaRecipe, SDRecipe
from lorakit.recipe.template import explanation, template

KINDS = [
    (SDRecipe, {"path": "path/to/your/pictures"}),
    (LlamaRecipe, {"train": [{"path": "path/to/your/chats.jsonl"}]}),
]


@pytest.mark.parametrize(("kind", "data"), KINDS)
def test_the_template_loads_as_all_defaults(tmp_path, monkeypatch, kind, data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(template(kind))
    assert load(tmp_path / "r.yaml", kind) == kind(data=data)


@pytest.mark.parametrize(("kind", "data"), KINDS)
def test_base_and_data_are_marked_to_be_edited(kind, data):
    base, line = [line for line in template(kind).splitlines() if line.endswith("# EDIT")]
    assert base.startswith("  model: builtin:")
    assert "path/to/your" in line
    assert data


@pytest.mark.parametrize(("kind", "data"), KINDS)
def test_every_key_stands_below_its_explanation(kind, data):
    text = template(kind)
    assert data
    for path, cls in sections(kind):
        for name in cls.model_fields:
            assert explanation(cls, name), f"{path}.{name} has no docstring"
            if path != "data.held_out.0":
                assert any(line.lstrip(" -#").startswith(f"{name}:") for line in text.splitlines()), f"{path}.{name}"
    lines = text.splitlines()
    assert all(len(line) <= 110 for line in lines)
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(("kind", "data"), KINDS)
def test_keys_that_are_commented_out_load_once_given(tmp_path, monkeypatch, kind, data):
    monkeypatch.chdir(tmp_path)
    text = template(kind).replace("# steps:", "steps: 5").replace("# revision:", "revision: main")
    (tmp_path / "r.yaml").write_text(text)
    found = load(tmp_path / "r.yaml", kind)
    assert found.base.revision == "main"
    assert found.train.steps == 5
    assert data

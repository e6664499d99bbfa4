"""Properties of recipes: a dump reads back equal, and whatever else a file holds, only RecipeError comes out."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from lorakit.errors import RecipeError
from lorakit.recipe.load import as_dict, dump, load
from lorakit.recipe.schema import LlamaRecipe, SDRecipe

FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20) | st.sampled_from(
    [
        "null",
        "~",
        "no",
        "1e5",
        "0o7",
        " x",
        "a: b",
        "# c",
        "- d",
        "*e",
        "&f",
        "!g",
        "'",
        '"',
        "\\",
        "\x85",
        "\u2028",
        "\ufeff",
    ]
)
PATHS = TEXT.map(lambda text: f"absent/{text}")
KEY = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=20)
RATE = st.floats(min_value=1e-300, max_value=1e300)
COUNT = st.integers(min_value=1, max_value=10**12)
SHARE = st.floats(min_value=0, max_value=1)
BELOW_ONE = st.floats(0, 1, exclude_max=True)
ADAPTER = {
    "rank": COUNT,
    "alpha": RATE,
    "dora": st.booleans(),
    "dropout": st.floats(min_value=0, max_value=1, exclude_max=True),
    "targets": st.sampled_from(["attention", "all-linear"]) | st.lists(TEXT, max_size=3),
    "rank_pattern": st.dictionaries(KEY, COUNT, max_size=3),
    "alpha_pattern": st.dictionaries(KEY, RATE, max_size=3),
}
LAYERS = {"layers": st.none() | st.lists(COUNT, max_size=3)}
SOURCES = st.lists(
    st.fixed_dictionaries({"path": PATHS}, optional={"revision": st.none() | TEXT, "weight": RATE}),
    min_size=1,
    max_size=3,
)
OPTIMIZER = st.fixed_dictionaries({}, optional={"learning_rate": RATE, "betas": st.tuples(BELOW_ONE, BELOW_ONE)})
LLAMA_VALID = st.builds(
    LlamaRecipe,
    data=st.fixed_dictionaries(
        {"train": SOURCES}, optional={"held_out": SOURCES | st.floats(0, 0.99), "packing": st.booleans()}
    ),
    adapter=st.fixed_dictionaries({}, optional=ADAPTER | LAYERS),
    optimizer=OPTIMIZER,
    train=st.sampled_from([{"steps": 3}, {"epochs": 0.5}, {}]),
    sample=st.fixed_dictionaries({}, optional={"prompts": st.lists(TEXT, max_size=3), "system": st.none() | TEXT}),
)
SD_VALID = st.builds(
    SDRecipe,
    data=st.fixed_dictionaries({"path": PATHS}, optional={"trigger": TEXT, "caption_dropout": SHARE}),
    adapter=st.fixed_dictionaries({}, optional=ADAPTER),
    optimizer=OPTIMIZER,
    sample=st.fixed_dictionaries({}, optional={"negative_prompt": TEXT, "width": st.none() | COUNT}),
)


@FUZZ
@given(valid=LLAMA_VALID | SD_VALID)
def test_a_dump_reads_back_equal(tmp_path, valid):
    path = tmp_path / "dumped.yaml"
    path.write_text(dump(valid), encoding="utf-8")
    assert load(path, type(valid)) == valid


@FUZZ
@given(valid=SD_VALID)
def test_other_yaml_readers_read_the_same_dump(valid):
    assert YAML(typ="safe", pure=True).load(dump(valid)) == as_dict(valid)


@pytest.mark.parametrize("version", ["1.1", "1.2"])
def test_words_that_are_values_to_some_readers_stay_words(version):
    words = ["null", "true", "false", "yes", "no", "on", "off", "y", "n", "Null", "TRUE", "Yes", "NO", "On", "OFF", "Y"]
    patterns = dict.fromkeys(words, 1)
    valid = SDRecipe(data={"path": "a"}, sample={"prompts": words}, adapter={"rank_pattern": patterns})
    reader = YAML(typ="safe", pure=True)
    reader.version = version
    assert reader.load(dump(valid)) == as_dict(valid)


def only_recipe_errors(path, kind=SDRecipe, *overrides):
    told: list[str] = []
    try:
        assert isinstance(load(path, kind, overrides), kind)
    except RecipeError as error:
        told = [str(error), *error.details]
    assert "".join(told).isprintable()


@FUZZ
@given(raw=st.binary(max_size=200) | st.text(max_size=200).map(lambda s: s.encode("utf-8", "surrogatepass")))
def test_random_bytes_raise_nothing_but_recipe_errors(tmp_path, raw):
    path = tmp_path / "r.yaml"
    path.write_bytes(raw)
    only_recipe_errors(path)


@FUZZ
@given(text=st.text(st.sampled_from("abc: -[]{},&*!|>'\"%@`#?~\n\t01.e\\<=\ufeff\x85"), max_size=120), override=TEXT)
def test_random_yaml_marks_raise_nothing_but_recipe_errors(tmp_path, text, override):
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    only_recipe_errors(path)
    path.write_text("data: {path: pictures}\n")
    only_recipe_errors(path, SDRecipe, text, f"train.steps={text}", f"data.path={override}", f"{override}={text}")


SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
TREE = st.recursive(SCALAR, lambda t: st.lists(t, max_size=4) | st.dictionaries(TEXT, t, max_size=4), max_leaves=12)
SECTIONS = st.sampled_from(sorted(LlamaRecipe.model_fields))
FIELDS = st.sampled_from(sorted({f for s in LlamaRecipe.model_fields.values() for f in s.annotation.model_fields}))


@FUZZ
@given(tree=st.dictionaries(SECTIONS | TEXT, st.dictionaries(FIELDS | TEXT, TREE, max_size=4) | TREE, max_size=5))
def test_random_trees_raise_nothing_but_recipe_errors(tmp_path, tree):
    path = tmp_path / "r.yaml"
    with path.open("w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump(tree, file)
    only_recipe_errors(path, LlamaRecipe)
    only_recipe_errors(path, SDRecipe)


@FUZZ
@given(valid=LLAMA_VALID, at=st.floats(0, 1), cut=st.integers(0, 6), put=st.text(max_size=5))
def test_mutated_recipes_raise_nothing_but_recipe_errors(tmp_path, valid, at, cut, put):
    text = dump(valid)
    place = int(at * len(text))
    path = tmp_path / "r.yaml"
    path.write_bytes((text[:place] + put + text[place + cut :]).encode("utf-8", "surrogatepass"))
    only_recipe_errors(path, LlamaRecipe)

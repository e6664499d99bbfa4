"""Recipes: every fault at its place, types led by the field, overrides, and a dump that reads back equal."""

import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.errors import RecipeError
from lorakit.recipe.load import load, load_any
from lorakit.recipe.schema import ChatSource, LlamaRecipe, SDRecipe
from tests.recipe.conftest import LLAMA, SD, faults


def test_importing_the_loader_leaves_torch_alone():
    code = "import lorakit.recipe.load, lorakit.recipe.template, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_sections_take_their_defaults(recipe):
    assert recipe(SD) == SDRecipe(data={"path": "pictures"})
    assert recipe(LLAMA + "optimizer:\ntrain:\n", LlamaRecipe) == LlamaRecipe(data={"train": [{"path": "chats.jsonl"}]})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: [1, 2", "r.yaml:1:12: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("data:\n  path: a: b\n", "r.yaml:2:10: not YAML: mapping values are not allowed here"),
        (SD + "adapter: {rnk: 4}\n", "r.yaml:2:11 adapter.rnk: unknown key; did you mean rank?"),
        (SD + "adaptor: {rank: 4}\n", "r.yaml:2:1 adaptor: unknown key; did you mean adapter?"),
        (SD + "optimizer: {lr: 4}\n", "r.yaml:2:13 optimizer.lr: unknown key; did you mean learning_rate?"),
        (
            SD + "train: {learning_rate: 1}\n",
            "r.yaml:2:9 train.learning_rate: unknown key here; it belongs in optimizer",
        ),
        (SD + "batch_size: 1\n", "r.yaml:2:1 batch_size: unknown key here; it belongs in train"),
        (
            "data: {path: a, max_tokens: 9}",
            "r.yaml:1:17 data.max_tokens: unknown key; only a LLaMA recipe has it",
        ),
        (
            SD + "train:\n  steps: 1\n  steps: 2\n",
            "r.yaml:4:3 steps: duplicate key steps, given before at r.yaml:3:3",
        ),
        (
            SD + "base: {model: !!python/name:os.getcwd a}\n",
            "r.yaml:2:15: the tag tag:yaml.org,2002:python/name:os.getcwd is refused; a recipe holds plain values",
        ),
        (SD + "train: {steps: no}\n", "r.yaml:2:16 train.steps: must be a whole number, not no"),
        (SD + "train: {steps: true}\n", "r.yaml:2:16 train.steps: must be a whole number, not true"),
        (SD + "train: {steps: 2.5}\n", "r.yaml:2:16 train.steps: must be a whole number, not 2.5"),
        (SD + "optimizer: {clip: yes}\n", "r.yaml:2:19 optimizer.clip: must be a number, not yes"),
        (SD + "adapter: {dora: 2}\n", "r.yaml:2:17 adapter.dora: must be true or false, not 2"),
        (SD + "adapter: {dropout: .nan}\n", "r.yaml:2:20 adapter.dropout: must be a finite number, not .nan"),
        (SD + "optimizer: {clip: .inf}\n", "r.yaml:2:19 optimizer.clip: must be a finite number, not .inf"),
        (SD + "optimizer: {clip: 1e999}\n", "r.yaml:2:19 optimizer.clip: must be a finite number, not 1e999"),
        (
            SD + "optimizer: {learning_rate: -1e-4}\n",
            "r.yaml:2:28 optimizer.learning_rate: must be greater than 0, not -1e-4",
        ),
        (SD + "adapter: {rank: 0}\n", "r.yaml:2:17 adapter.rank: must be greater than 0, not 0"),
        (
            SD + "adapter: {targets: mlp}\n",
            "r.yaml:2:20 adapter.targets: must be attention, attention+mlp or all-linear, or a list, not mlp",
        ),
        (
            SD + "adapter: {init: gausian}\n",
            "r.yaml:2:17 adapter.init: must be gaussian or kaiming, not gausian; did you mean gaussian?",
        ),
        (
            SD + "optimizer: {betas: [0.9]}\n",
            "r.yaml:2:20 optimizer.betas: must be a list of 2 numbers, not a list of 1",
        ),
        (SD + "optimizer: {betas: [0.9, 1.0]}\n", "r.yaml:2:26 optimizer.betas.1: must be less than 1, not 1.0"),
        (SD + "sample: {seed: }\n", "r.yaml:2:10 sample.seed: must be a whole number, not empty"),
        (SD + "train: 3\n", "r.yaml:2:8 train: must be a section of keys"),
        (SD + "train: {steps: 1, epochs: 1}\n", "r.yaml:2:8 train: give steps or epochs, not both"),
        (
            SD + 'sample: {prompts: ["a\\0b"]}\n',
            "r.yaml:2:20 sample.prompts.0: holds a character that no text may hold",
        ),
        (
            SD + 'sample: {prompts: ["\\ud800"]}\n',
            "r.yaml:2:20 sample.prompts.0: holds a character that no text may hold",
        ),
        ("train: {steps: 1}\n", "r.yaml:1:1 data.path: is missing: A folder of pictures"),
        ("data:\n", "r.yaml:1:1 data.path: is missing: A folder of pictures"),
        ("", "r.yaml: is empty"),
        ("# nothing\n", "r.yaml: is empty"),
        ("- a\n- b\n", "r.yaml:1:1: must hold sections such as base and data, not a list"),
        ("words", "r.yaml:1:1: must hold sections such as base and data, not a single value"),
        (SD + "---\n" + SD, "r.yaml:2:1: a second document; a recipe is one"),
        (b"data:\n  path: \xff\n", "r.yaml:2:9: is not UTF-8"),
        (b"data:\n  p\0: a\n", "r.yaml:2:4: a NUL character"),
        ("data:\n  path: \x07\n", "r.yaml:2:9: not YAML: the character U+0007"),
        (SD + "#" * (1 << 20), "r.yaml: is larger than 1 MiB"),
        ("data: " + "[" * 60 + "]" * 60, "r.yaml:1:56: nested deeper than 50"),
        (SD + "base: &a [*a]\n", "r.yaml:2:11: no finished value is called &a"),
        (SD + "? [a]\n: b\n", "r.yaml:2:3: a key must be a word"),
        (SD + '"a\\eb": 1\n', "r.yaml:2:1: a key of over 200 or of unprintable characters"),
    ],
)
def test_a_fault_is_told_with_its_place(recipe, text, expected):
    (line,) = faults(recipe, text)
    assert line.startswith(expected)


def test_int8_with_dora_is_told_where_int8_stands(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("data: {train: [{path: a}]}\nbase: {quantization: int8}\nadapter: {dora: true}\n")
    with pytest.raises(RecipeError) as caught:
        load(path, LlamaRecipe)
    assert str(caught.value).startswith(f"{path}:2:22 base.quantization: int8 and adapter.dora do not go together")


def test_an_alias_bomb_is_refused_before_it_is_written_out(recipe):
    rows = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    rows += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    (line,) = faults(recipe, "\n".join(rows))
    assert "more than 20000 values" in line


def test_aliases_in_bounds_work(recipe):
    found = recipe(SD + "sample: {prompts: &p [a cat, a dog]}\noutput: {track: []}\ntrain: {steps: &n 7, seed: *n}\n")
    assert (found.train.steps, found.train.seed) == (7, 7)


def test_every_fault_is_told_at_once(recipe):
    text = "adapter: {rank: 0, alfa: 3}\noptimizer: {name: sgd}\ndata: {crop: left}\ntrain: {steps: 1, steps: 2}\n"
    lines = faults(recipe, text)
    fields = [line.split(": ")[0].split(" ")[1] for line in lines]
    assert sorted(fields) == sorted(
        ["steps", "adapter.rank", "adapter.alfa", "optimizer.name", "data.crop", "data.path"]
    )
    assert not any(word in " ".join(lines).lower() for word in ("pydantic", "http", "input should", "validation"))


@pytest.mark.parametrize(
    ("held_out", "expected"),
    [
        ("1.5", "r.yaml:4:13 data.held_out: must be less than 1, not 1.5"),
        ("some", "r.yaml:4:13 data.held_out: must be a number or a list, not some"),
        ("{path: a}", "r.yaml:4:13 data.held_out: must be a number or a list, not a section of keys"),
        ("[{path: a, weight: 0}]", "r.yaml:4:32 data.held_out.0.weight: must be greater than 0, not 0"),
    ],
)
def test_a_field_of_two_types_gives_one_sentence(recipe, held_out, expected):
    (line,) = faults(recipe, f"{LLAMA}  held_out: {held_out}\n", LlamaRecipe)
    assert line == expected


def test_scalars_are_read_as_their_fields_want(recipe):
    text = """
base: {model: builtin:mini-sd, revision: 1e5}
adapter: {rslora: yes, dora: off, text_encoder: "true", alpha: 1e1, rank: 0x10, targets: [no, 7]}
data: {path: 007, trigger: on, flip: No, caption_dropout: 1e-1}
train: {steps: 1e3}
optimizer: {learning_rate: 1e-4}
sample: {prompts: [null_, 1.10, no], width: ~}
output: {name: 2024}
"""
    found = recipe(text)
    assert found.base.revision == "1e5"
    assert (found.adapter.rslora, found.adapter.dora, found.adapter.text_encoder) == (True, False, True)
    assert (found.adapter.alpha, found.adapter.rank, found.adapter.targets) == (10.0, 16, ["no", "7"])
    assert (found.data.path, found.data.trigger, found.data.flip) == ("007", "on", False)
    assert found.data.caption_dropout == 0.1
    assert found.train.steps == 1000
    assert found.optimizer.learning_rate == 1e-4
    assert found.sample.prompts == ["null_", "1.10", "no"]
    assert found.sample.width is None
    assert found.output.name == "2024"


def test_environment_variables_stay_literal(recipe, monkeypatch):
    monkeypatch.setenv("SECRET", "told")
    assert recipe("data: {path: a}\noutput: {folder: ~/runs}\n").output.folder == Path.home() / "runs"
    found = recipe("data: {path: '${SECRET}/a'}\nbase: {model: $SECRET}\noutput: {folder: ~x}\n")
    assert (found.data.path, found.base.model, found.output.folder) == ("${SECRET}/a", "$SECRET", Path("~x"))


def test_overrides_change_add_and_reach_into_lists(recipe):
    text = LLAMA + "train: {epochs: 2}\nadapter: {rank: 4}\n"
    found = recipe(
        text,
        LlamaRecipe,
        "data.train.0.path=other.jsonl",
        "data.train.1.path=more.jsonl",
        "train.epochs=null",
        "train.steps=1e2",
        "adapter.targets=[q_proj, v_proj]",
        'adapter.rank_pattern={"layers.0.q_proj": 8}',
        "sample.system=",
    )
    assert [source.path for source in found.data.train] == ["other.jsonl", "more.jsonl"]
    assert (found.train.steps, found.train.epochs) == (100, None)
    assert found.adapter.targets == ["q_proj", "v_proj"]
    assert found.adapter.rank_pattern == {"layers.0.q_proj": 8}
    assert found.adapter.rank == 4


def test_an_override_leaves_what_an_alias_shares_alone(recipe):
    text = "data:\n  train: [&s {path: a}]\n  held_out: [*s]\n"
    found = recipe(text, LlamaRecipe, "data.held_out.0.path=b")
    assert found.data.train == [ChatSource(path="a")]
    assert found.data.held_out == [ChatSource(path="b")]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps", "--set steps: must be SECTION.KEY=VALUE, such as train.steps=50"),
        ("=3", "--set =3: must be SECTION.KEY=VALUE, such as train.steps=50"),
        ("a..b=3", "--set a..b=3: must be SECTION.KEY=VALUE, such as train.steps=50"),
        ("trian.steps=3", "--set trian: unknown key; did you mean train?"),
        ("train.stpes=3", "--set train.stpes: unknown key; did you mean steps?"),
        ("train.steps=0", "--set train.steps: must be greater than 0, not 0"),
        ("train.steps=[", "--set train.steps: the value is not YAML: expected the node content"),
        ("train.seed=9223372036854775808", "--set train.seed: must be less than 9223372036854775808"),
        ("train.seed.x=1", "--set train.seed: must be a whole number, not a section of keys"),
        ("base.model.x=1", "--set base.model.x: base.model is a single value and has no x"),
        ("data.path.0=1", "--set data.path.0: data.path is a single value and has no 0"),
        ("sample.prompts.2=a", "--set sample.prompts.2: sample.prompts is a list of 1, counted from 0; there is no 2"),
        ("train.seed=!x 1", "--set train.seed: the tag !x is refused; a recipe holds plain values"),
    ],
)
def test_a_bad_override_is_told_with_its_name(recipe, override, expected):
    (line,) = faults(recipe, SD + "base: {model: a}\nsample: {prompts: [b]}\n", SDRecipe, override)
    assert line.startswith(expected)


def test_control_characters_in_names_are_escaped(tmp_path):
    path = tmp_path / "a\n\x1b[31mb.yaml"
    path.write_text("data: {path: a, '\x85': 1, cr\u2028op: 2}")
    with pytest.raises(RecipeError) as caught:
        load(path, SDRecipe)
    assert "".join(caught.value.details).isprintable()
    assert "a\\n\\x1b[31mb.yaml" in caught.value.details[0]


def test_a_recipe_of_the_other_family_is_recognised(recipe):
    for text, kind, command in ((SD, LlamaRecipe, "train-sd"), (LLAMA, SDRecipe, "train-llama")):
        with pytest.raises(RecipeError) as caught:
            recipe(text, kind)
        assert command in caught.value.hint


def test_thousands_of_faults_are_counted_and_cut_short(recipe):
    lines = faults(recipe, SD + "".join(f"k{n}: 1\n" for n in range(2000)))
    assert len(lines) == 51
    with pytest.raises(RecipeError, match="2000 faults"):
        load(Path("r.yaml"), SDRecipe)


def test_load_any_tells_the_family_from_the_data(recipe):
    recipe(SD)
    assert isinstance(load_any(Path("r.yaml")), SDRecipe)
    recipe(LLAMA, LlamaRecipe)
    assert isinstance(load_any(Path("r.yaml"), ["train.steps=3"]), LlamaRecipe)
    Path("r.yaml").write_text("data: {a: 1}")
    with pytest.raises(RecipeError, match="either path"):
        load_any(Path("r.yaml"))

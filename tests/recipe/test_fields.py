"""What a recipe says when it says nothing, and what a run that is resumed may change: each field by name."""

import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Literal, get_args, get_origin

import pytest

from lorakit.errors import RecipeError
from lorakit.recipe.build import sections
from lorakit.recipe.load import as_dict
from lorakit.recipe.schema import LlamaRecipe, SDRecipe, Section
from lorakit.training.checkpoint import State
from lorakit.training.resumable import check_resumable
from tests.recipe.conftest import LLAMA as CHATS
from tests.recipe.conftest import SD as PICTURES

BOTH: dict[str, Any] = {
    "base.revision": None,
    "adapter.rslora": False,
    "adapter.dropout": 0.0,
    "adapter.dora": False,
    "adapter.targets": "attention",
    "adapter.rank_pattern": {},
    "adapter.alpha_pattern": {},
    "adapter.init": "gaussian",
    "data.held_out": 0.05,
    "data.on_bad": "fail",
    "train.steps": None,
    "train.epochs": None,
    "train.seed": 0,
    "train.evaluate_every": 0,
    "train.checkpoint_every": 200,
    "train.checkpoint_minutes": 10.0,
    "train.keep_checkpoints": 2,
    "optimizer.name": "adamw_8bit",
    "optimizer.schedule": "cosine",
    "optimizer.warmup": 0.03,
    "optimizer.weight_decay": 0.01,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.clip": 1.0,
    "sample.every": 0,
    "sample.prompts": [],
    "sample.seed": 0,
    "output.folder": "runs",
    "output.name": "run",
    "output.track": [],
    "compute.precision": "auto",
    "compute.gradient_accumulation": 1,
    "compute.gradient_checkpointing": False,
    "compute.compile": False,
    "compute.device": "auto",
}
LLAMA = BOTH | {
    "base.model": "builtin:smollm2-135m",
    "base.quantization": "none",
    "adapter.rank": 16,
    "adapter.alpha": None,
    "adapter.layers": None,
    "data.train.0.path": "a",
    "data.train.0.format": "auto",
    "data.train.0.config": None,
    "data.train.0.split": "train",
    "data.train.0.revision": None,
    "data.train.0.weight": 1.0,
    "data.max_tokens": 1024,
    "data.chat_template": None,
    "data.packing": True,
    "train.batch_size": 8,
    "optimizer.learning_rate": 2e-4,
    "sample.system": None,
    "sample.max_new_tokens": 96,
    "sample.temperature": 0.0,
    "sample.top_p": 1.0,
}
SD = BOTH | {
    "base.model": "builtin:mini-sd",
    "adapter.rank": 8,
    "adapter.alpha": None,
    "adapter.text_encoder": False,
    "data.path": "a",
    "data.split": "train",
    "data.revision": None,
    "data.image_column": "image",
    "data.caption_column": "text",
    "data.resolution": None,
    "data.buckets": True,
    "data.bucket_step": 64,
    "data.crop": "center",
    "data.flip": False,
    "data.repeats": 1,
    "data.caption_dropout": 0.1,
    "data.shuffle_tags": False,
    "data.keep_tags": 1,
    "data.trigger": "",
    "train.batch_size": 4,
    "train.noise_offset": 0.0,
    "train.min_snr_gamma": 0.0,
    "optimizer.learning_rate": 1e-4,
    "optimizer.text_encoder_learning_rate": None,
    "sample.negative_prompt": "",
    "sample.steps": 25,
    "sample.guidance_scale": 7.5,
    "sample.width": None,
    "sample.height": None,
}
SAFE = {
    "base.model", "base.revision", "data.on_bad", "train.evaluate_every", "train.checkpoint_every",
    "train.checkpoint_minutes", "train.keep_checkpoints", "sample.every", "sample.prompts", "sample.seed",
    "output.folder", "output.name", "output.track", "compute.device", "compute.precision",
    "compute.gradient_checkpointing",
}  # fmt: skip
LLAMA_SAFE = SAFE | {
    "data.train.0.path", "data.train.1.path", "data.held_out.0.path", "sample.system", "sample.max_new_tokens",
    "sample.temperature", "sample.top_p",
}  # fmt: skip
SD_SAFE = SAFE | {
    "data.path", "sample.negative_prompt", "sample.steps", "sample.guidance_scale", "sample.width", "sample.height",
}  # fmt: skip


def fields(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Each field's dotted name and value; a list's sections count by their place."""
    inner = dict(enumerate(value)) if isinstance(value, list) and value and isinstance(value[0], dict) else value
    if not (isinstance(inner, dict) and inner):
        yield name, value
        return
    for key, below in inner.items():
        yield from fields(below, f"{name}.{key}" if name else str(key))


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [(LlamaRecipe(data={"train": [{"path": "a"}]}), LLAMA), (SDRecipe(data={"path": "a"}), SD)],
    ids=["llama", "sd"],
)
def test_every_default(recipe: LlamaRecipe | SDRecipe, expected: dict[str, Any]) -> None:
    assert dict(fields(as_dict(recipe))) == expected


def words(annotation: Any) -> Iterator[str]:
    """Every fixed word that a field takes, at any depth of its annotation."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for inner in get_args(annotation):
            yield from words(inner)


def offered(kind: type[Section]) -> list[tuple[str, str]]:
    """Each field of ``kind`` that takes fixed words, with each of them."""
    return [
        (f"{path}.{name}", word)
        for path, section in sections(kind)
        for name, field in section.model_fields.items()
        for word in words(field.annotation)
    ]


@pytest.mark.parametrize(("kind", "text"), [(LlamaRecipe, CHATS), (SDRecipe, PICTURES)], ids=["llama", "sd"])
def test_every_word_that_a_field_takes_is_read(recipe: Any, kind: type[LlamaRecipe | SDRecipe], text: str) -> None:
    assert ("compute.precision", "bf16") in offered(kind)
    for field, word in offered(kind):
        name = field.replace("data.held_out.0", "data.train.0")
        value = [word] if field == "output.track" else word
        loaded = dict(fields(as_dict(recipe(text, kind, f"{name}={json.dumps(value)}"))))
        assert loaded[name] == value, field


def state(recipe: dict[str, Any]) -> State:
    what = {"base_id": "base sha256:0", "base_texts": {}, "data_hash": "0", "devices": "cpu", "dtype": "float32"}
    return State(**what, recipe=recipe, world=1)


def changed(recipe: dict[str, Any], field: str) -> dict[str, Any]:
    """A recipe with another value in one field."""
    found = copy.deepcopy(recipe)
    *parents, last = (int(part) if part.isdecimal() else part for part in field.split("."))
    section: Any = found
    for part in parents:
        section = section[part]
    section[last] = "another"
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("kind", "data", "safe"),
    [
        (LlamaRecipe, {"train": [{"path": "a"}, {"path": "b"}], "held_out": [{"path": "c"}]}, LLAMA_SAFE),
        (SDRecipe, {"path": "a"}, SD_SAFE),
    ],
    ids=["llama", "sd"],
)
def test_what_a_resumed_run_may_change(
    kind: type[LlamaRecipe | SDRecipe], data: dict[str, Any], safe: set[str], dropout: float
) -> None:
    recipe, may = as_dict(kind(data=data, adapter={"dropout": dropout})), set()
    for field, _ in fields(recipe):
        with suppress(RecipeError):
            check_resumable(state(recipe), state(changed(recipe, field)), allow=True)
            may.add(field)
    assert may == safe | ({"compute.gradient_accumulation", "compute.compile"} if not dropout else set())

"""The plan against what loading really makes, and without any library once it has been made."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lorakit.families.llama.library
import lorakit.families.llama.skeleton
from lorakit.errors import ModelError, RecipeError
from lorakit.families.llama import task as llama
from lorakit.families.llama.plan import LlamaPlan, plan
from lorakit.families.place import Place
from lorakit.numerics.order import Layout
from lorakit.recipe.schema import Adapter, ChatData, LlamaAdapter, LlamaBase, LlamaSample
from tests.tiny import tiny_gguf, tiny_llama, tiny_tokenizer

LAYOUT, CPU = Layout(0, 4), torch.device("cpu")
PLACE = Place(CPU, torch.float32)


def another(kind: str, **options: Any) -> Callable[[Path], Path]:
    """A tiny model of another architecture."""

    def make(folder: Path) -> Path:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 408}
        config = AutoConfig.for_model(kind, **{**sizes, **heads, "max_position_embeddings": 256, **options})
        config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return folder

    return make


def gguf(folder: Path) -> Path:
    """With the piece that transformers adds where a GGUF file's vocabulary lacks it."""
    for file in tiny_llama(folder).glob("*.json"):
        file.write_text(file.read_text().replace("<pad>", "<|endoftext|>"))
    return tiny_gguf(folder.with_suffix(".gguf"), model=folder)


BASES: dict[str, Callable[[Path], Path]] = {
    "llama": tiny_llama,
    "llama, untied, in shards": lambda folder: tiny_llama(folder, tied=False, max_shard_size="40KB"),
    "mistral": another("mistral", sliding_window=128),
    "qwen2": another("qwen2"),
    "qwen3": another("qwen3", head_dim=16),
    "gguf": gguf,
}
ADAPTERS = (
    Adapter(rank=4),
    Adapter(rank=2, targets="all-linear", dora=True),
    LlamaAdapter(rank=2, targets=["q_proj", "down_proj"], rank_pattern={"down_proj": 3}, layers=[1]),
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> ChatData:
    turns = [("user", "What does {} do?"), ("assistant", "It is {}, and so on."), ("user", "?"), ("assistant", "{}")]
    rows = [
        {"messages": [{"role": role, "content": text.format("x" * n)} for role, text in turns]} for n in range(1, 13)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ChatData(train=[{"path": str(tmp_path / "chats.jsonl")}], held_out=0.2, max_tokens=48)


def no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a plan that asks transformers for a model or a tokenizer fails."""

    def refuse(*_: object) -> None:
        raise AssertionError("a library is asked")

    monkeypatch.setattr(lorakit.families.llama.skeleton, "skeleton", refuse)
    monkeypatch.setattr(lorakit.families.llama.library, "load_fitting_tokenizer", refuse)


def told(planned: LlamaPlan) -> tuple[object, ...]:
    figures = planned.modules, planned.total_parameters, planned.trainable_parameters, planned.memory
    return (*figures, planned.steps_per_epoch, planned.examples, planned.notes, planned.chats.fingerprint().digest)


@pytest.mark.parametrize("kind", BASES)
def test_the_plan_is_what_load_makes(
    kind: str, tmp_path: Path, data: ChatData, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = LlamaBase(model=str(BASES[kind](tmp_path / "base")))
    expected = []
    for adapter in ADAPTERS:
        task = llama.load(base, adapter, data, LlamaSample(), LAYOUT, PLACE, learning_rate=1e-3)
        state, lm = task.adapter_state(), task.model.lm  # type: ignore[union-attr]
        planned = plan(base, adapter, data, LlamaSample(), LAYOUT, PLACE)
        assert {target.name for target in planned.modules} == {key.split(".lora_")[0] for key in state}
        assert planned.trainable_parameters == sum(tensor.numel() for tensor in state.values())
        assert planned.total_parameters == sum(p.numel() for p in lm.parameters() if not p.requires_grad)
        assert planned.memory["base weights"] == 4 * planned.total_parameters
        assert planned.chats.fingerprint() == task.fingerprint
        assert planned.steps_per_epoch == task.steps_per_epoch
        expected.append(told(planned))
    no_libraries(monkeypatch)
    assert [told(plan(base, adapter, data, LlamaSample(), LAYOUT, PLACE)) for adapter in ADAPTERS] == expected
    if kind != "gguf":  # which unpacks to another folder
        half = plan(base, Adapter(rank=8), data, LlamaSample(), Layout(0, 8), Place(CPU, torch.bfloat16, True))
        assert half.memory["base weights"] == 2 * half.total_parameters


def test_a_recipe_that_does_not_fit_is_refused_without_libraries_too(
    tmp_path: Path, data: ChatData, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = LlamaBase(model=str(another("mistral", max_position_embeddings=32)(tmp_path / "base")))
    short = data.model_copy(update={"max_tokens": 32})
    for _ in range(2):
        plan(base, Adapter(rank=2), short, LlamaSample(), LAYOUT, PLACE)
        with pytest.raises(RecipeError, match="more than the 32 tokens"):
            plan(base, Adapter(rank=2), data, LlamaSample(), LAYOUT, PLACE)
        with pytest.raises(RecipeError, match="no layer of the model"):
            plan(base, Adapter(rank=2, targets=["q_prj"]), short, LlamaSample(), LAYOUT, PLACE)
        no_libraries(monkeypatch)


@pytest.mark.parametrize(
    ("file", "change", "error"),
    [
        ("config.json", {"hidden_act": "unheard-of"}, ModelError),
        ("config.json", {"max_position_embeddings": 40}, RecipeError),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"brandnew": 5000}, "merges": []}}, ModelError),
    ],
)
def test_a_base_that_changes_is_looked_at_anew(
    tmp_path: Path, data: ChatData, file: str, change: dict[str, Any], error: type[Exception]
) -> None:
    base = tiny_llama(tmp_path / "base")
    plan(LlamaBase(model=str(base)), Adapter(rank=2), data, LlamaSample(), LAYOUT, PLACE)
    (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | change))
    with pytest.raises(error):
        plan(LlamaBase(model=str(base)), Adapter(rank=2), data, LlamaSample(), LAYOUT, PLACE)


def test_plan_and_load_refuse_the_head_alike(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "base", tied=False)
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    data = ChatData(train=[{"path": str(tmp_path / "chats.jsonl")}], held_out=0, max_tokens=64)  # type: ignore[list-item]
    base, adapter = LlamaBase(model=str(tmp_path / "base")), Adapter(rank=2, targets=["lm_head", "q_proj"])
    with pytest.raises(RecipeError) as caught:
        plan(base, adapter, data, LlamaSample(), LAYOUT, PLACE)
    assert caught.value.where == "adapter.targets"
    with pytest.raises(RecipeError) as caught:
        llama.load(base, adapter, data, LlamaSample(), LAYOUT, PLACE, learning_rate=1e-3)
    assert caught.value.where == "adapter.targets"


def test_plan_and_load_refuse_a_system_message_over_raw_text(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "raw text"}\n' * 4)
    data = ChatData(train=[{"path": str(tmp_path / "text.jsonl")}], held_out=0, max_tokens=64)  # type: ignore[list-item]
    base, sample = LlamaBase(model=str(tiny_llama(tmp_path / "base"))), LlamaSample(system="Be kind.")
    with pytest.raises(RecipeError, match="no system message"):
        plan(base, Adapter(rank=2), data, sample, LAYOUT, PLACE)
    with pytest.raises(RecipeError, match="no system message"):
        llama.load(base, Adapter(rank=2), data, sample, LAYOUT, PLACE, learning_rate=1e-3)


@pytest.mark.parametrize("dora", [False, True])
def test_dora_over_a_quantized_base_keeps_more(tmp_path: Path, dora: bool) -> None:
    """PEFT's float32 copy [tokens, in] of each of its layers' input, where the base would keep it in bfloat16."""
    folder, data, where = *made(tmp_path), Place(torch.device("cpu"), torch.bfloat16)
    bases = [LlamaBase.model_validate({"model": str(folder), "quantization": kind}) for kind in ("none", "nf4")]
    plans = [plan(base, Adapter(rank=2, dora=dora), data, LlamaSample(), LAYOUT, where) for base in bases]
    tokens = sum(len(chat.tokens) for chat in plans[0].chats.train)
    kept = 2 * tokens * sum(target.inputs for target in plans[0].modules) * dora
    assert plans[1].memory["activations"] - plans[0].memory["activations"] == kept


def made(folder: Path) -> tuple[Path, ChatData]:
    """A base and four chats."""
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (folder / "chats.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    data = {"train": [{"path": str(folder / "chats.jsonl")}], "held_out": 0, "max_tokens": 64}
    return tiny_llama(folder / "base"), ChatData.model_validate(data)


def test_dora_keeps_more(tmp_path: Path) -> None:
    """[tokens, out] of each of its layers, in float32."""
    folder, data = made(tmp_path)
    base = LlamaBase(model=str(folder))
    plain, dora = (plan(base, Adapter(rank=2, dora=on), data, LlamaSample(), LAYOUT, PLACE) for on in (False, True))
    tokens = sum(len(chat.tokens) for chat in plain.chats.train)
    kept = 4 * tokens * sum(target.outputs for target in dora.modules)
    assert dora.memory["activations"] - plain.memory["activations"] == kept

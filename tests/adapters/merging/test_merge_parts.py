"""Merging what PEFT trains beside LoRA of layers, tied heads, several adapters, 4-bit bases: against PEFT's forward."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lorakit.adapters import gguf_lora
from lorakit.adapters.convert import convert
from lorakit.adapters.delta import Delta
from lorakit.adapters.files import read_adapter
from lorakit.adapters.merging import layers, stream
from lorakit.adapters.merging.change import Change
from lorakit.adapters.merging.merge import merge
from lorakit.adapters.merging.nf4 import NF4Source
from lorakit.adapters.merging.plan import MergePlan, Settings, plan_merge
from lorakit.adapters.merging.reference import parameters_on_meta, run_from_files
from lorakit.adapters.merging.source import FileSource
from lorakit.commands.merge_told import compare_with
from lorakit.errors import ModelError
from lorakit.families.llama import compare as llama_compare
from lorakit.families.llama.generate import open_chat
from lorakit.families.llama.library import load_model
from lorakit.families.llama.skeleton import open_language_model
from lorakit.families.place import Place
from lorakit.storage.bases import BaseLocation, resolve
from tests.tiny import tiny_llama, tiny_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*:UserWarning"),
]
TOKENS = torch.arange(24).reshape(2, 12)
FLOAT32 = Place(torch.device("cpu"), torch.float32)
Q, EMBED, HEAD = "q_proj", "embed_tokens", "lm_head"


def adapter(base: Path, out: Path, seed: int = 0, saving: Mapping[str, Any] = {}, **options: Any) -> torch.Tensor:
    """Save a PEFT adapter with every trained number disturbed; the logits of base + adapter as PEFT computes them."""
    kind = Qwen2ForCausalLM if "Qwen2" in (base / "config.json").read_text() else LlamaForCausalLM
    model = get_peft_model(
        kind.from_pretrained(base, dtype=torch.float32), LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Adapter 'default': .*invalid shape")  # PEFT's, of B's own biases
        model.save_pretrained(out, **saving)
    return logits(model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits.float()


def planned(base: Path, adapters: list[tuple[Path, float]], out: Path) -> MergePlan:
    location = resolve(str(base))
    return plan_merge(location, open_language_model(location), adapters, out)


def merged(base: Path, adapters: list[tuple[Path, float]], out: Path, settings: Settings = Settings()) -> Path:
    """Merged, its tensors and its logits verified."""
    location = resolve(str(base))
    plan = plan_merge(location, open_language_model(location), adapters, out, settings)

    def compare(place: Path, *_: object) -> dict[str, Any]:
        share = llama_compare.compare(location, plan.adapters, place, settings.quant_base).difference
        assert share < 1e-4
        return {"difference": share}

    report = merge(plan, compare=compare)
    assert report.checked is not None
    assert report.checked.changed >= report.changed > 0
    assert report.checked.worst <= 1
    return out


def from_files(base: Path, adapters: list[tuple[Path, float]]) -> torch.Tensor:
    """The logits of base + adapters, computed from their files."""
    location = resolve(str(base))
    opened = open_language_model(location, parameters_on_meta())
    planned_adapters = plan_merge(location, opened, adapters, base / "out", Settings()).adapters
    run_from_files(opened, planned_adapters)
    return logits(opened.models["model"])


PARTS = {
    "head whole": (True, {"target_modules": [Q], "modules_to_save": [HEAD]}),
    "embedding whole": (True, {"target_modules": [Q], "modules_to_save": [EMBED]}),
    "both whole": (True, {"target_modules": [Q], "modules_to_save": [EMBED, HEAD]}),
    "both whole and tied": (True, {"target_modules": [Q], "modules_to_save": [EMBED], "ensure_weight_tying": True}),
    "embedding": (True, {"target_modules": [Q, EMBED]}),
    "head": (True, {"target_modules": [Q, HEAD]}),
    "embedding and head": (True, {"target_modules": [Q, EMBED, HEAD]}),
    "tied LoRA": (True, {"target_modules": [Q, EMBED, HEAD], "ensure_weight_tying": True}),
    "untied head whole": (False, {"target_modules": [Q], "modules_to_save": [HEAD]}),
    "untied embedding": (False, {"target_modules": [Q, EMBED]}),
    "norms whole": (True, {"target_modules": [Q], "modules_to_save": ["norm"]}),
    "dora": (False, {"target_modules": [Q, "down_proj"], "use_dora": True}),
    "dora of the head": (False, {"target_modules": [Q, HEAD], "use_dora": True}),
    "dora of a tied head": (True, {"target_modules": [Q, HEAD], "use_dora": True}),
    "tokens": (False, {"target_modules": [Q], "trainable_token_indices": [3, 1, 250]}),
    "tokens of a tied embedding": (True, {"target_modules": [Q], "trainable_token_indices": {EMBED: [3, 1, 250]}}),
    "tokens of a tied head": (True, {"target_modules": [Q], "trainable_token_indices": {HEAD: [4, 2]}}),
    "tokens of a tied embedding, others of its head": (
        True,
        {"target_modules": [Q], "trainable_token_indices": {EMBED: [3, 7], HEAD: [4, 7]}},
    ),
    "tokens and the head's": (False, {"target_modules": [Q], "trainable_token_indices": {EMBED: [3], HEAD: [4, 2]}}),
    "tokens and a head with LoRA": (False, {"target_modules": [Q, HEAD], "trainable_token_indices": [0, 7]}),
    "fan in fan out": (True, {"target_modules": [Q, "down_proj"], "fan_in_fan_out": True, "use_rslora": True}),
}


@pytest.mark.parametrize("case", PARTS)
def test_computes_what_peft_computes(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "READ", 1200)
    tied, options = PARTS[case]
    base = tiny_llama(tmp_path / "base", tied=tied, max_shard_size="40KB")
    expected = adapter(base, tmp_path / "adapter", **options)
    found = from_files(base, [(tmp_path / "adapter", 1.0)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (from_files(base, []) - expected).abs().max() > 0.01, "the adapter says something"
    out = merged(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    model = LlamaForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    stays = tied and not {EMBED, HEAD} & {*options["target_modules"], *options.get("modules_to_save", [])}
    stays &= HEAD not in options.get("trainable_token_indices", [])
    stays |= "ensure_weight_tying" in options
    assert model.config.tie_word_embeddings == stays
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert ("lm_head.weight" in weight_map) == (not stays)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize(
    "case",
    ["embedding whole", "both whole", "embedding", "head", "tokens of a tied embedding", "tokens of a tied head"],
)
def test_a_head_in_the_file_of_a_base_whose_config_ties_it(tmp_path: Path, case: str, equal: bool) -> None:
    """transformers takes it where it is another one, and ties it where it is not."""
    base, file = tiny_llama(tmp_path / "base", tied=True), tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    head = embedding.clone() if equal else torch.randn(embedding.shape, generator=torch.Generator().manual_seed(5))
    save_file(tensors | {"lm_head.weight": head}, file, {"format": "pt"})
    expected = adapter(base, tmp_path / "adapter", **PARTS[case][1])
    out = merged(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(out)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora", "gaussian"])
def test_an_adapter_whose_start_changed_its_base(tmp_path: Path, start: str) -> None:
    """PEFT takes B A of the beginning off the base's weights; what it saves is no change of the base's own."""
    base = tiny_llama(tmp_path / "base")
    adapter(base, tmp_path / "adapter", target_modules=[Q], init_lora_weights=start)
    if start == "gaussian":
        assert planned(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out").changed
        return
    with pytest.raises(ModelError, match=f"init_lora_weights is '{start}': its base was changed"):
        planned(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")


def test_a_head_that_is_targeted_and_saved_whole(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", tied=False)
    expected = adapter(base, tmp_path / "adapter", target_modules=[Q, HEAD], modules_to_save=[HEAD])
    out = merged(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(out)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("modules", [[EMBED], [EMBED, HEAD]])
def test_modules_saved_whole_beside_copies_of_the_embeddings(tmp_path: Path, tied: bool, modules: list[str]) -> None:
    """What PEFT writes once the vocabulary grew: each module once more by its inner name, and its untrained self."""
    base = tiny_llama(tmp_path / "base", tied=tied)
    saving = {"save_embedding_layers": True}
    expected = adapter(base, tmp_path / "adapter", target_modules=[Q], modules_to_save=modules, saving=saving)
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(".original_module." in key for key in written)
    out = merged(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(out)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"modules_to_save": [HEAD]}, {"trainable_token_indices": [3, 1]}, {"modules_to_save": ["norm"]}]
)
@pytest.mark.parametrize("weights", [(0.5, 0.25), (-1.0, 1.0), (10.0, -9.0)])
def test_what_cancels_between_whole_tensors_verifies(
    tmp_path: Path, options: dict[str, Any], weights: tuple[float, float]
) -> None:
    base = tiny_llama(tmp_path / "base", tied=False)
    for seed in (1, 2):
        adapter(base, tmp_path / f"adapter-{seed}", seed=seed, target_modules=[Q], **options)
    given = [(tmp_path / f"adapter-{seed}", weight) for seed, weight in zip((1, 2), weights, strict=True)]
    merged(base, given, tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("fuse", [True, False])
def test_lora_of_the_head(tmp_path: Path, tied: bool, copied: bool, fuse: bool) -> None:
    """PEFT saves a copy of the base's head with it, unless it is told not to; on a tied one it moves no embedding."""
    base = tiny_llama(tmp_path / "base", tied=tied)
    options = {"save_embedding_layers": copied}
    expected = adapter(base, tmp_path / "adapter", target_modules=[Q, HEAD], saving=options)
    chat = open_chat(resolve(str(base)), [(tmp_path / "adapter", 1.0)], FLOAT32, fuse=fuse)
    torch.testing.assert_close(chat.decoder.start(0, TOKENS[0].tolist()), expected[0, -1], rtol=1e-4, atol=1e-4)
    out = merged(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(out)), expected, rtol=1e-4, atol=1e-4)


def test_a_copy_of_another_head_is_left_to_a_merge(tmp_path: Path) -> None:
    base, other = (tiny_llama(tmp_path / name, tied=False, seed=seed) for seed, name in enumerate(("base", "other")))
    adapter(other, tmp_path / "adapter", target_modules=[Q, HEAD])
    with pytest.raises(ModelError, match="not the base's weight"):
        read_adapter(tmp_path / "adapter", {"model": LlamaForCausalLM.from_pretrained(base)})


def test_lora_of_a_tied_head_is_none_for_llama_cpp(tmp_path: Path) -> None:
    for tied in (True, False):
        base = tiny_llama(tmp_path / f"base-{tied}", tied=tied)
        adapter(base, tmp_path / f"adapter-{tied}", target_modules=[Q, HEAD])
        models = {"model": LlamaForCausalLM.from_pretrained(base)}
        saved = read_adapter(tmp_path / f"adapter-{tied}", models)
        out = tmp_path / f"{tied}.gguf"
        if not tied:
            assert convert(saved, out, "gguf", models=models, base_name="").modules == 3
            continue
        with pytest.raises(ModelError, match="the base's head is its embedding"):
            convert(saved, out, "gguf", models=models, base_name="")


def test_a_gguf_adapter_for_another_width_is_refused_by_its_shapes(tmp_path: Path) -> None:
    shape = {"hidden_size": 20, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    narrow = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **shape))
    changes = {"model.layers.0.self_attn.q_proj": Delta(torch.randn(2, 20), torch.randn(20, 2), 1.0)}
    gguf_lora.write(tmp_path / "a.gguf", changes, narrow, alpha=2, metadata={})
    base = LlamaForCausalLM.from_pretrained(tiny_llama(tmp_path / "base"))
    with pytest.raises(ModelError, match="the adapter is for a weight"):
        read_adapter(tmp_path / "a.gguf", {"model": base})


def test_shards_may_have_any_names(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", tied=False, max_shard_size="40KB")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    names = {
        shard: f"my-part-{number}.safetensors" for number, shard in enumerate(sorted({*index["weight_map"].values()}))
    }
    assert len(names) > 1
    for old, new in names.items():
        (base / old).rename(base / new)
    index["weight_map"] = {name: names[shard] for name, shard in index["weight_map"].items()}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = adapter(base, tmp_path / "adapter", target_modules=[Q])
    out = merged(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert json.loads((out / "model.safetensors.index.json").read_text())["weight_map"] == index["weight_map"]
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(out)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("modules", [[Q], [Q, HEAD]])
def test_what_an_index_says_beside_the_size_comes_along(tmp_path: Path, modules: list[str]) -> None:
    base = tiny_llama(tmp_path / "base", tied=True, max_shard_size="40KB")
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    assert index["metadata"]["total_parameters"] == LlamaForCausalLM.from_pretrained(base).num_parameters()
    index["metadata"]["mergekit_version"] = "0.1.0"
    path.write_text(json.dumps(index))
    adapter(base, tmp_path / "adapter", target_modules=modules)
    out = merged(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    told = json.loads((out / "model.safetensors.index.json").read_text())["metadata"]
    expected = dict(index["metadata"])
    if HEAD in modules:  # which has a weight of its own from now on
        del expected["total_parameters"]
        tensors = load_file(out / index["weight_map"]["model.embed_tokens.weight"])
        expected["total_size"] += tensors["lm_head.weight"].nbytes
    assert told == expected


def test_a_base_with_float64_verifies(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", tied=False)
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    save_file(tensors, file, {"format": "pt"})
    adapter(base, tmp_path / "adapter", target_modules=[Q])
    plan = planned(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    report = merge(plan, compare=compare_with(plan))
    assert report.compared is not None
    assert report.compared["difference"] < report.compared["allowed"] == 0.001


def test_an_adapter_of_a_grown_vocabulary_says_what_its_base_is(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", tied=False)
    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(410)
    model.save_pretrained(tmp_path / "grown")
    adapter(tmp_path / "grown", tmp_path / "adapter", target_modules=[Q], modules_to_save=[EMBED, HEAD])
    with pytest.raises(ModelError, match="410") as caught:
        planned(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert "resize_token_embeddings(410)" in caught.value.hint


def test_named_chat_templates_come_along(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    adapter(base, tmp_path / "adapter", target_modules=[Q])
    out = merged(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    templates = AutoTokenizer.from_pretrained(out).chat_template
    assert templates == AutoTokenizer.from_pretrained(base).chat_template
    assert templates["tool_use"] == "tools"


def test_only_a_merge_takes_in_what_is_not_lora_of_a_layer(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    for options in ({"modules_to_save": [HEAD]}, {"target_modules": [EMBED]}, {"trainable_token_indices": [3]}):
        adapter(base, tmp_path / "adapter", **{"target_modules": [Q], **options})
        with pytest.raises(ModelError, match="only a merge"):
            read_adapter(tmp_path / "adapter", {"model": LlamaForCausalLM.from_pretrained(base)})
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["norm"]}))
    with pytest.raises(ModelError, match="'norm', the weights do not have it"):
        planned(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out")


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """A base whose q, k and v have biases."""
    tokenizer = tiny_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    Qwen2ForCausalLM(
        Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, max_window_layers=2, **shape)
    ).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


BIASES = {"all": {"bias": "all"}, "lora_only": {"bias": "lora_only"}, "of B": {"lora_bias": True}}
BIASES |= {"of B, rslora": {"lora_bias": True, "use_rslora": True}}


@pytest.mark.parametrize("kind", BIASES)
def test_biases(qwen: Path, tmp_path: Path, kind: str) -> None:
    expected = adapter(qwen, tmp_path / "adapter", target_modules=[Q], **BIASES[kind])
    torch.testing.assert_close(from_files(qwen, [(tmp_path / "adapter", 1.0)]), expected, rtol=1e-4, atol=1e-5)
    out = merged(qwen, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    torch.testing.assert_close(logits(Qwen2ForCausalLM.from_pretrained(out)), expected, rtol=1e-4, atol=1e-4)
    name = "model.layers.0.self_attn.q_proj.bias"
    before, after = load_file(qwen / "model.safetensors"), load_file(out / "model.safetensors")
    assert not torch.equal(before[name], after[name])


def test_biases_of_b_need_a_bias_and_a_merge(qwen: Path, tmp_path: Path) -> None:
    adapter(qwen, tmp_path / "a", target_modules=[Q], lora_bias=True)
    with pytest.raises(ModelError, match="only a merge"):
        read_adapter(tmp_path / "a", {"model": Qwen2ForCausalLM.from_pretrained(qwen)})
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"lora_bias": False}))
    with pytest.raises(ModelError, match="lora_bias is False, the file has biases"):
        planned(qwen, [(tmp_path / "a", 1.0)], tmp_path / "out")
    base = tiny_llama(tmp_path / "llama")
    with pytest.warns(UserWarning, match="no bias"):
        adapter(base, tmp_path / "b", target_modules=[Q], lora_bias=True)
    with pytest.raises(ModelError, match="the base's layer has none"):
        planned(base, [(tmp_path / "b", 1.0)], tmp_path / "out")


def test_tokens_are_what_they_became_and_the_rest_keeps_its_bytes(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", tied=True, dtype=torch.bfloat16)
    adapter(base, tmp_path / "a", target_modules=[Q], trainable_token_indices=[5, 2])
    merge(planned(base, [(tmp_path / "a", 1.0)], tmp_path / "out"))
    theirs: Any = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "a").merge_and_unload()
    name = "model.embed_tokens.weight"
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert torch.equal(after[name], theirs.get_input_embeddings().weight)
    same = (before[name] == after[name]).all(1)
    assert same.logical_not().nonzero().flatten().tolist() == [2, 5]
    assert "lm_head.weight" not in after
    half = planned(base, [(tmp_path / "a", 0.5), (tmp_path / "a", 0.25)], tmp_path / "half")
    merge(half)
    found = load_file(tmp_path / "half" / "model.safetensors")[name]
    values = load_file(tmp_path / "a" / "adapter_model.safetensors")
    trained = values["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"].float()
    expected = (0.25 * before[name][[5, 2]].float() + 0.75 * trained).to(torch.bfloat16)
    torch.testing.assert_close(found[[5, 2]], expected)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for indices, message in (([5], "1 tokens"), ([5, 5], "1 tokens"), ([5, 4000], "does not have"), (None, "no list")):
        changed = json.dumps(config | {"trainable_token_indices": indices})
        (tmp_path / "a" / "adapter_config.json").write_text(changed)
        with pytest.raises(ModelError, match=message):
            planned(base, [(tmp_path / "a", 1.0)], tmp_path / "never")


def test_several_adapters_are_one_sum(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", dtype=torch.bfloat16, tied=False)
    adapter(base, tmp_path / "a", seed=1, target_modules=[Q, "down_proj"], modules_to_save=[HEAD])
    adapter(base, tmp_path / "b", seed=2, target_modules=[Q, "up_proj"], modules_to_save=[HEAD], use_rslora=True)
    plan = planned(base, [(tmp_path / "a", 0.75), (tmp_path / "b", -0.5)], tmp_path / "out")
    merge(plan)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    name = "model.layers.1.self_attn.q_proj"
    pairs = [(t, s) for t, s in ((a, 0.75 * 6 / 4), (b, -0.5 * 6 / 2))]
    total = before[f"{name}.weight"].double()
    for tensors, scale in pairs:
        lora = [tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB"]
        total += scale * lora[1] @ lora[0]
    assert torch.equal(after[f"{name}.weight"], total.bfloat16())
    head = before["lm_head.weight"].double()
    wholes = [t["base_model.model.lm_head.weight"].double() for t in (a, b)]
    expected = head + 0.75 * (wholes[0] - head) - 0.5 * (wholes[1] - head)
    torch.testing.assert_close(after["lm_head.weight"].double(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("ranks", [(3,), (3, 1), (2, 3, 4)])
def test_the_size_of_a_sum_is_that_of_the_dense_change(ranks: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(ranks))
    pairs = [[torch.randn(shape, generator=generator) for shape in ((rank, 5), (7, rank))] for rank in ranks]
    terms = [(Delta(a, b, 0.5 + n), 1 - 0.7 * n) for n, (a, b) in enumerate(pairs)]
    dense = sum(weight * d.scale * d.B.double() @ d.A.double() for d, weight in terms)
    assert Change(terms).square == pytest.approx(float(dense.square().sum()), rel=1e-9)


def test_dora_does_not_add_up(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter(base, tmp_path / "a", target_modules=[Q], use_dora=True)
    adapter(base, tmp_path / "b", target_modules=[Q])
    adapter(base, tmp_path / "c", target_modules=["o_proj"], modules_to_save=[Q])
    for others in ("bc", "ac", "ca", "ab", "ba"):
        adapters = [(tmp_path / name, 1.0) for name in others]
        if "a" not in others:
            planned(base, adapters, tmp_path / "out")
            continue
        with pytest.raises(ModelError, match="does not add up"):
            planned(base, adapters, tmp_path / "out")


def test_a_base_that_lacks_a_tensor_or_has_another_shape_does_not_run(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for changed, message in ((None, "lacks a tensor"), (torch.zeros(60, 32), "rows and columns in the file")):
        left = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file(left if changed is None else left | {name: changed}, base / "model.safetensors", {"format": "pt"})
        location = BaseLocation("base", base, "llama", "transformers")
        opened = open_language_model(location, parameters_on_meta())
        with pytest.raises(ModelError, match=message) as caught:
            run_from_files(opened)
        assert caught.value.where == name


@pytest.mark.parametrize("columns", [33, 48, 64, 200])
def test_nf4_by_rows_is_bitsandbytes_own(columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.adapters.merging.nf4.READ", 1000)
    monkeypatch.setattr("lorakit.adapters.merging.nf4.PIECE", 640)
    weight = torch.randn(162, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    row = weight.float().reshape(1, -1)
    whole = bnb.dequantize_4bit(*bnb.quantize_4bit(row, compress_statistics=True, quant_type="nf4"))
    expected = whole.view(162, columns)
    save_file({"w": weight}, tmp_path / "w.safetensors")
    source = NF4Source(FileSource(tmp_path / "w.safetensors"), {"w"})
    for first, last in ((0, 162), (7, 93), (159, 162)):
        assert torch.equal(source.rows("w", first, last), expected[first:last])


def test_a_base_as_training_over_4_bits_saw_it(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", tied=False)
    config = LlamaForCausalLM.from_pretrained(base).config
    config.hidden_size, config.head_dim = 64, 16  # rows of whole blocks, as every published model has
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(base)
    adapter(base, tmp_path / "adapter", target_modules=[Q])
    adapters, settings = [(tmp_path / "adapter", 1.0)], Settings(quant_base="as-trained")
    out = merged(base, adapters, tmp_path / "out", settings)
    model = load_model(resolve(str(base)), Place(torch.device("cpu"), torch.float32), "nf4", attention="sdpa")
    trained = PeftModel.from_pretrained(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(out)), logits(trained), rtol=1e-3, atol=1e-3)
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert kept == {name for name in before if "norm" in name or "embed" in name or "lm_head" in name}


def test_rows_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama(tmp_path / "base", dtype=torch.bfloat16)
    adapter(base, tmp_path / "adapter", target_modules=[Q, "down_proj", EMBED], use_dora=False)
    adapters = [(tmp_path / "adapter", 0.5)]
    one = merge(planned(base, adapters, tmp_path / "one"))
    monkeypatch.setattr(stream, "READ", 900)
    monkeypatch.setattr(stream, "WORK", 70)
    other = merge(planned(base, adapters, tmp_path / "other"))
    files = [FileSource(tmp_path / name / "model.safetensors") for name in ("one", "other")]
    for name, slot in files[0].slots.items():
        a, b = (file.rows(name, 0, slot.rows).float() for file in files)
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6)
    assert one.rounding == pytest.approx(other.rounding, rel=0.1)
    assert one.lost == pytest.approx(other.lost, rel=0.01)

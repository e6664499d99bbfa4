"""`lorakit convert` as a user calls it: what it says of the base, and how it gets along without one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, LlamaForCausalLM
from typer.testing import CliRunner

from lorakit.adapters.delta import Delta, product
from lorakit.adapters.files import read_adapter
from lorakit.adapters.outline import adaptable
from lorakit.adapters.write import taken_apart, write_diffusers, write_peft
from lorakit.cli import app
from lorakit.commands.adapters import open_base
from lorakit.errors import ModelError
from lorakit.families.task import origin
from lorakit.recipe.load import as_dict
from lorakit.recipe.schema import SDRecipe
from lorakit.storage.bases import resolve
from tests.adapters.test_convert import random_delta
from tests.tiny import tiny_llama, tiny_sd, tiny_sdxl

ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
GUESSED = "no base is given: Stable Diffusion 1 is taken by the width of the text; name another with --base"


def lorakit(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def strings(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_kohyas_metadata_are_those_that_training_writes(tmp_path: Path) -> None:
    """An SD 2 with v-prediction, whose text is 1024 wide: modelspec's names are those of the field's own programs."""
    base = tiny_sd(tmp_path / "base", "v_prediction")
    config = base / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cross_attention_dim": 1024}))
    unet = open_base(resolve(str(base))).models["unet"]
    layers = {path: layer for path, layer in adaptable(unet).items() if path.endswith("attn2.to_k")}
    changes = {path: random_delta(layer, 2, 3.0, torch.float32, dora=False, seed=0) for path, layer in layers.items()}
    for asked, resolution in ((40, "40x40"), (None, "64x64")):
        recipe = SDRecipe.model_validate({"data": {"path": "pictures", "resolution": asked}})
        adapter, out = tmp_path / f"adapter-{asked}", tmp_path / f"{asked}.safetensors"
        write_peft(
            adapter / "unet",
            *taken_apart(changes, unet),
            base_name="tiny",
            metadata=origin("style", "tiny sha256:0", as_dict(recipe)),
        )
        lorakit("convert", adapter, out, "--to", "kohya", "--base", base)
        told = strings(out)
        assert told["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
        assert told["modelspec.prediction_type"] == "v"
        assert told["modelspec.resolution"] == resolution
        assert (told["ss_v2"], told["ss_base_model_version"]) == ("True", "sd_v2")
    lorakit("convert", out, tmp_path / "back", "--to", "peft", "--base", base)
    lorakit("convert", tmp_path / "back", tmp_path / "again.safetensors", "--to", "kohya", "--base", base)
    again = strings(tmp_path / "again.safetensors")
    assert {key for key in told if told[key] != again.get(key)} <= {"modelspec.title", "modelspec.date"}


def test_what_an_sd_2_predicts_is_not_made_up(tmp_path: Path) -> None:
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    change = {path: random_delta(torch.nn.Linear(1024, 320), 2, 3.0, torch.float32, dora=False, seed=0)}
    write_peft(tmp_path / "a" / "unet", *taken_apart(change, None), base_name="")
    lorakit("convert", tmp_path / "a", tmp_path / "a.safetensors", "--to", "kohya")
    told = strings(tmp_path / "a.safetensors")
    assert told["ss_v2"] == "True"
    assert not {"modelspec.architecture", "modelspec.prediction_type", "modelspec.resolution"} & told.keys()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)])
def test_a_copy_of_the_bases_weight_is_left_out_and_no_other(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    """PEFT saves the weight of a head with LoRA too, in the dtype that training had it in."""
    base, adapter = tiny_llama(tmp_path / "base", tied=tied), tmp_path / "adapter"
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(LlamaForCausalLM.from_pretrained(base, dtype=dtype), config).save_pretrained(adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    copy = "base_model.model.lm_head.base_layer.weight"
    assert weights[copy].dtype == dtype

    lorakit("convert", adapter, tmp_path / "out", "--to", "peft", "--base", base)
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == weights.keys() - {copy}
    ours, theirs = (
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / name)
        for name in ("out", "adapter")
    )
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=2e-2, atol=2e-2)
    lorakit("merge", base, adapter, tmp_path / "sum", "--as-adapter", "2")

    with pytest.raises(ModelError, match="only the base can tell") as caught:
        lorakit("convert", adapter, tmp_path / "other", "--to", "peft")
    assert "--base" in caught.value.hint
    weights[copy][3] += 1
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
    for words in (
        ("convert", adapter, tmp_path / "other", "--to", "peft", "--base", base),
        ("merge", base, adapter, tmp_path / "other", "--as-adapter", "2"),
    ):
        with pytest.raises(ModelError, match=r"lm_head\.weight: not the base's weight: only a merge can take it in"):
            lorakit(*words)
    assert not (tmp_path / "other").exists()


def encoder_layers(base: Path, component: str) -> dict[str, Delta]:
    layers = adaptable(open_base(resolve(str(base))).models[component])
    chosen = {path: layer for path, layer in layers.items() if path.endswith("q_proj")}
    return {path: random_delta(layer, 2, 3.0, torch.float32, dora=False, seed=0) for path, layer in chosen.items()}


def test_a_folder_of_sdxls_second_text_encoder_is_known_by_its_name(tmp_path: Path) -> None:
    base = tiny_sdxl(tmp_path / "base")
    for folder in (tmp_path / "adapter" / "text_encoder_2", tmp_path / "adapter" / "text_encoder"):
        component = folder.name
        changes = encoder_layers(base, component)
        write_peft(folder, *taken_apart(changes, None), base_name="")
        out = tmp_path / f"{component}.safetensors"
        lorakit("convert", folder, out, "--to", "kohya", "--base", base)
        start = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[component]
        assert all(name.startswith(start) for name in load_file(out))
        assert len(load_file(out)) == 3 * len(changes)


def test_a_folder_of_sdxls_second_text_encoder_is_known_by_its_width(tmp_path: Path) -> None:
    path = "text_model.encoder.layers.3.self_attn.q_proj"
    for width, prefix in ((1280, "text_encoder_2"), (768, "text_encoder")):
        change = {path: random_delta(torch.nn.Linear(width, width), 2, 3.0, torch.float32, dora=False, seed=0)}
        write_peft(tmp_path / str(width), *taken_apart(change, None), base_name="")
        lorakit("convert", tmp_path / str(width), tmp_path / f"{width}.safetensors", "--to", "diffusers")
        assert set(load_file(tmp_path / f"{width}.safetensors")) == {
            f"{prefix}.{path}.lora_{part}.weight" for part in ("A", "B")
        }


def test_no_base_is_needed_between_diffusers_and_peft(tmp_path: Path) -> None:
    """Of an unpublished model, whose text is as wide as a published one's or not; PEFT opens the text encoders."""
    base, layer = tiny_sdxl(tmp_path / "base"), "down_blocks.0.attentions.0.transformer_blocks.7.attn2.to_k"
    changes: dict[str, dict[str, Delta]] = {name: encoder_layers(base, name) for name in ENCODERS}
    changes["unet"] = {layer: random_delta(torch.nn.Linear(768, 24), 2, 3.0, torch.float32, dora=False, seed=0)}
    write_diffusers(tmp_path / "a.safetensors", changes, "")
    lorakit("convert", tmp_path / "a.safetensors", tmp_path / "peft", "--to", "peft")
    for component, kind in ENCODERS.items():
        model = PeftModel.from_pretrained(kind.from_pretrained(base / component), tmp_path / "peft" / component)
        for path, delta in changes[component].items():
            found = model.base_model.model.get_submodule(path).get_delta_weight("default")
            torch.testing.assert_close(found, product(delta))
    lorakit("convert", tmp_path / "peft", tmp_path / "b.safetensors", "--to", "diffusers")
    one, other = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    lorakit("convert", tmp_path / "peft" / "unet", tmp_path / "c", "--to", "diffusers")
    with pytest.raises(ModelError, match="no such module") as caught:
        lorakit("convert", tmp_path / "c", tmp_path / "c.safetensors", "--to", "kohya")
    assert caught.value.hint == GUESSED


def test_a_base_that_was_guessed_is_told(tmp_path: Path) -> None:
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    change = {path: random_delta(torch.nn.Linear(768, 320), 2, 3.0, torch.float32, dora=False, seed=0)}
    write_peft(tmp_path / "a" / "unet", *taken_apart(change, None), base_name="")
    words = ["convert", str(tmp_path / "a"), str(tmp_path / "a.safetensors"), "--to", "kohya"]
    told = CliRunner().invoke(app, words, catch_exceptions=False).stderr
    assert GUESSED in " ".join(told.split())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_lora_of_an_embedding_goes_to_llama_cpp_unless_it_is_the_head_too(tmp_path: Path) -> None:
    """llama.cpp adds alpha / r * b a[token] to a token's row; what it makes of a is in its llm_build_inp_embd."""
    for tied in (False, True):
        base, adapter, out = (tmp_path / f"{name}-{tied}" for name in ("base", "adapter", "out"))
        tiny_llama(base, tied=tied)
        options = {"r": 2, "lora_alpha": 3, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
        config = LoraConfig(target_modules=["q_proj", "embed_tokens"], **options)
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
        model.save_pretrained(adapter)
        if tied:
            with pytest.raises(ModelError, match="embed_tokens: the base's head is its embedding, and"):
                lorakit("convert", adapter, f"{out}.gguf", "--to", "gguf", "--base", base)
            continue
        lorakit("convert", adapter, f"{out}.gguf", "--to", "gguf", "--base", base)
        found = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(f"{out}.gguf").tensors}
        a, b = (found[f"token_embd.weight.lora_{letter}"] for letter in "ab")
        assert len(a) == model.config.vocab_size
        rows = [3 / 2 * (b @ a[token]) for token in range(len(a))]
        layer = model.base_model.model.model.embed_tokens
        np.testing.assert_allclose(rows, layer.get_delta_weight("default").detach().numpy(), rtol=1e-5, atol=1e-6)
        lorakit("merge", base, f"{out}.gguf", out)
        merged = model.merge_and_unload().state_dict()
        for name, tensor in load_file(out / "model.safetensors").items():
            torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)
        lorakit("convert", f"{out}.gguf", tmp_path / "back", "--to", "peft", "--base", base)
        theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "back")
        back = theirs.base_model.model.model.embed_tokens.get_delta_weight("default")
        torch.testing.assert_close(back, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)


EMBEDDINGS = {
    "plain": {"r": 2, "lora_alpha": 3},
    "rsLoRA, patterns": {"r": 4, "use_rslora": True, "rank_pattern": {"embed_tokens": 2}},
    "tied": {"r": 2, "ensure_weight_tying": True},
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_lora_of_an_embedding_stays_in_pefts_format(tmp_path: Path, kind: str) -> None:
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    tiny_llama(base, tied=kind == "tied")
    targets = ["q_proj", "embed_tokens", *(["lm_head"] if kind == "tied" else [])]
    options = {"target_modules": targets, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    theirs = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**options, **EMBEDDINGS[kind]))
    theirs.save_pretrained(adapter)
    lorakit("convert", adapter, out, "--to", "peft", "--base", base)
    assert "base_model.model.model.embed_tokens.lora_embedding_A" in load_file(out / "adapter_model.safetensors")
    ours = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), out)
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=5e-5)
    lorakit("resize", adapter, tmp_path / "one", "--rank", "1", "--base", base)
    assert (
        load_file(tmp_path / "one" / "adapter_model.safetensors").keys()
        == load_file(out / "adapter_model.safetensors").keys()
    )

    with pytest.raises(ModelError) as caught:
        lorakit("convert", adapter, tmp_path / "other", "--to", "peft")
    assert "--base" in caught.value.hint


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_saved_beside_untrained_are_the_bases(tmp_path: Path, tied: bool) -> None:
    """As ``save_embedding_layers`` has it, and a module in ``modules_to_save`` that training never moved."""
    base, adapter = tiny_llama(tmp_path / "base", tied=tied), tmp_path / "adapter"
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    model.save_pretrained(adapter, save_embedding_layers=True)
    weights = load_file(adapter / "adapter_model.safetensors")
    copies = {key for key in weights if ".lora_" not in key}
    assert any("embed_tokens" in key for key in copies)
    lorakit("convert", adapter, tmp_path / "out", "--to", "peft", "--base", base)
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == weights.keys() - copies
    assert read_adapter(adapter, {"model": LlamaForCausalLM.from_pretrained(base)}).all_deltas()
    with pytest.raises(ModelError, match="only the base can tell"):
        lorakit("convert", adapter, tmp_path / "other", "--to", "peft")
    weights["base_model.model.model.embed_tokens.weight"][3] += 1
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"embed_tokens\.weight: not the base's weight: only a merge"):
        lorakit("convert", adapter, tmp_path / "other", "--to", "peft", "--base", base)

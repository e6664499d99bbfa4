"""`lorakit convert` as a user calls it: what it says of the base, and how it gets along without one."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from lorakit.adapters.outline import adaptable
from lorakit.adapters.write import taken_apart, write_peft
from lorakit.cli import app
from lorakit.commands.adapters import meta_models
from lorakit.errors import ModelError
from lorakit.families.task import origin
from lorakit.recipe.load import as_dict
from lorakit.recipe.schema import SDRecipe
from lorakit.storage.bases import resolve
from tests.adapters.test_convert import random_delta
from tests.tiny import tiny_llama, tiny_sd


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
    unet = meta_models(resolve(str(base)))["unet"]
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

"""`lorakit inspect` and `lorakit convert` as a user calls them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from lorakit.adapters.delta import product
from lorakit.adapters.files import read_adapter
from lorakit.adapters.known import known_models
from lorakit.adapters.outline import adaptable
from lorakit.adapters.write import taken_apart, write_kohya, write_peft
from lorakit.cli import app
from lorakit.commands.adapters import open_base
from lorakit.errors import LorakitError
from lorakit.families.task import origin
from lorakit.recipe.load import as_dict, dump
from lorakit.recipe.schema import LlamaRecipe, SDRecipe
from lorakit.storage.bases import resolve
from tests.adapters.test_convert import random_delta
from tests.tiny import tiny_llama, tiny_sd, tiny_tokenizer

SD_RECIPE = SDRecipe.model_validate({"data": {"path": "pictures"}, "adapter": {"rank": 4, "targets": ["to_q"]}})
LLAMA_RECIPE = LlamaRecipe.model_validate({"data": {"train": [{"path": "a.jsonl"}]}, "output": {"name": "chats"}})


def lorakit(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def kohya(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for the first two blocks of SD 1.5, with two ranks and alphas, DoRA-less; no base in its metadata."""
    layers = adaptable(known_models("sd_v1")["unet"])
    chosen = [path for path in layers if path.endswith("attn2.to_k") and path.startswith("down_blocks.0")]
    chosen += [path for path in layers if path.endswith("to_out.0") and path.startswith("mid_block")]
    changes = {
        path: random_delta(layers[path], 2 + 2 * number, 4.0, torch.float32, dora=False, seed=number)
        for number, path in enumerate(chosen)
    }
    path = tmp_path_factory.mktemp("kohya") / "style.safetensors"
    strings = {"lorakit_recipe": json.dumps(as_dict(SD_RECIPE))}
    write_kohya(
        path,
        {"unet": changes},
        title="style",
        version="sd_v1",
        prediction_type="epsilon",
        resolution=512,
        models=known_models("sd_v1"),
        metadata=strings,
    )
    return path


def test_a_description_as_json(kohya: Path) -> None:
    told = json.loads(lorakit("inspect", kohya, "--json"))
    assert (told["format"], told["family"], told["kind"], told["dtypes"]) == ("kohya", "sd", "LoRA", ["float32"])
    assert told["bytes"] == kohya.stat().st_size
    assert told["modules"] == 4
    assert told["dead"] == told["faults"] == []
    blocks = {block["name"]: block for block in told["blocks"]}
    assert list(blocks) == ["unet.down_blocks.0", "unet.mid_block"]
    assert blocks["unet.down_blocks.0"]["ranks"] == [2, 4]
    assert blocks["unet.mid_block"]["ranks"] == [6, 8]
    assert blocks["unet.mid_block"]["alphas"] == [4.0]
    changes = read_adapter(kohya, known_models("sd_v1")).components["unet"]
    squares = {path: product(delta).double().square().sum().item() for path, delta in changes.items()}
    for name, block in blocks.items():
        inside = [value for path, value in squares.items() if f"unet.{path}".startswith(name)]
        assert block["norm"] == pytest.approx(sum(inside) ** 0.5, rel=1e-5)
    assert told["norm"] == pytest.approx(sum(squares.values()) ** 0.5, rel=1e-5)
    assert told["metadata"]["ss_base_model_version"] == "sd_v1"


def test_rslora_of_a_diffusers_file_is_told(tmp_path: Path) -> None:
    layers = adaptable(known_models("sd_v1")["unet"])
    path = next(path for path in layers if path.endswith("attn2.to_k"))
    delta = random_delta(layers[path], 4, 4.0, torch.float32, dora=False, seed=0)
    config = {"unet.r": 4, "unet.lora_alpha": 4, "unet.use_rslora": True}
    tensors = {f"unet.{path}.lora_A.weight": delta.A, f"unet.{path}.lora_B.weight": delta.B}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    told = json.loads(lorakit("inspect", tmp_path / "a.safetensors", "--json"))
    assert told["kind"] == "rsLoRA"
    assert told["blocks"][0]["alphas"] == [4.0]


def test_dead_and_broken_modules_are_named(kohya: Path, tmp_path: Path) -> None:
    tensors = load_file(kohya)
    names = sorted({key.split(".")[0] for key in tensors})
    tensors[f"{names[0]}.lora_up.weight"].zero_()
    tensors[f"{names[1]}.lora_down.weight"][0, 0] = torch.nan
    del tensors[f"{names[2]}.lora_up.weight"]
    tensors[f"{names[3]}.lora_down.weight"].zero_()
    save_file(tensors, tmp_path / "a.safetensors")
    told = json.loads(lorakit("inspect", tmp_path / "a.safetensors", "--json"))
    dead = [f"lora_unet_{name.removeprefix('unet.').replace('.', '_')}" for name in told["dead"]]
    assert sorted(dead) == [names[0], names[3]]
    assert None in [block["norm"] for block in told["blocks"]], "JSON has no NaN"
    assert sorted(fault.partition(": ")[2] for fault in told["faults"]) == ["NaN or infinity", "its B is missing"]
    text = lorakit("inspect", tmp_path / "a.safetensors")
    assert "dead (A, B or scale is zero)" in text
    assert "NaN or infinity" in text


def test_two_spellings_of_one_module_are_told(kohya: Path, tmp_path: Path) -> None:
    tensors = load_file(kohya)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    other = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"
    again = {key.replace(name, other): tensor.clone() for key, tensor in tensors.items() if key.startswith(name)}
    save_file(tensors | again, tmp_path / "a.safetensors")
    told = json.loads(lorakit("inspect", tmp_path / "a.safetensors", "--json"))
    assert told["modules"] == 4
    assert told["faults"] == [f"{other}.alpha: says the same as {name}.alpha"]
    assert f"broken: {told['faults'][0]}" in lorakit("inspect", tmp_path / "a.safetensors").splitlines()


@pytest.mark.parametrize(
    ("part", "tensor", "told"),
    [
        ("lora_up.weight", torch.ones(320, 3), "do not multiply"),
        ("lora_up.weight", torch.ones(320, 2, 1), "do not multiply"),
        ("lora_down.weight", torch.ones(2), "do not multiply"),
        ("lora_down.weight", torch.tensor(1.0), "do not multiply"),
        ("alpha", torch.ones(2), "alpha has shape"),
        ("alpha", torch.ones(0), "alpha has shape"),
        ("alpha", torch.tensor(2**40), "alpha is 1.09951e+12"),
        ("dora_scale", torch.tensor(1.0), "only DoRA on the output"),
        ("dora_scale", torch.ones(1, 768), "only DoRA on the output"),
    ],
)
def test_what_makes_no_change_is_named(kohya: Path, tmp_path: Path, part: str, tensor: torch.Tensor, told: str) -> None:
    tensors = load_file(kohya)
    name = next(key for key in tensors if tensors[key].shape == (320, 2)).split(".")[0]
    save_file(tensors | {f"{name}.{part}": tensor}, tmp_path / "a.safetensors")
    found = json.loads(lorakit("inspect", tmp_path / "a.safetensors", "--json"))
    assert (found["modules"], len(found["faults"])) == (4, 1)
    assert found["faults"][0].startswith(f"{name}.")
    assert told in found["faults"][0]


def test_what_does_not_fit_the_base_is_told(kohya: Path, tmp_path: Path) -> None:
    """Another width, a module too many, another family; nothing where all fits."""
    base = tiny_sd(tmp_path / "sd")
    told = json.loads(lorakit("inspect", kohya, "--base", base, "--json"))
    assert len(told["unfit"]) == 4
    to_k = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    assert f"unet.{to_k}: the adapter is for a weight (320, 768), the base has (32, 32)" in told["unfit"]
    second = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k"
    assert f"{second}: the base has no such module" in told["unfit"]
    assert lorakit("inspect", kohya, "--base", base).count("does not fit the base: ") == 4
    assert json.loads(lorakit("inspect", kohya, "--json"))["unfit"] == []
    llama = tiny_llama(tmp_path / "llama")
    told = json.loads(lorakit("inspect", kohya, "--base", llama, "--json"))
    assert told["unfit"] == ["4 modules: made for a model with a unet, which the base is not"]

    linear = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(2, 64)}
    linear["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"] = torch.ones(64, 2)
    save_file(linear, tmp_path / "linear.safetensors")
    assert json.loads(lorakit("inspect", tmp_path / "linear.safetensors", "--base", base, "--json"))["unfit"] == []


def test_what_does_not_fit_the_base_of_a_gguf_adapter(named: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    base, _ = named
    lorakit("convert", tmp_path / "knows", tmp_path / "a.gguf", "--to", "gguf", "--base", base)
    assert json.loads(lorakit("inspect", tmp_path / "a.gguf", "--base", base, "--json"))["unfit"] == []
    wide = tmp_path / "wide"
    LlamaForCausalLM(LlamaConfig.from_pretrained(base, hidden_size=64, head_dim=16)).save_pretrained(wide)
    tiny_tokenizer().save_pretrained(wide)
    told = json.loads(lorakit("inspect", tmp_path / "a.gguf", "--base", wide, "--json"))
    assert len(told["unfit"]) == 2
    assert "the adapter is for a weight (32, 32), the base has (64, 64)" in told["unfit"][0]


@pytest.mark.parametrize("recipe", [SD_RECIPE, LLAMA_RECIPE], ids=["sd", "llama"])
def test_the_recipe_comes_back(kohya: Path, tmp_path: Path, recipe: SDRecipe | LlamaRecipe) -> None:
    path = kohya
    if isinstance(recipe, LlamaRecipe):
        layer = torch.nn.Linear(8, 8)
        change = {"model.layers.0.self_attn.q_proj": random_delta(layer, 2, 3.0, torch.float32, dora=False, seed=0)}
        path = tmp_path / "a"
        state, injection = taken_apart(change, None)
        write_peft(path, state, injection, base_name="x", metadata=origin("chats", "x sha256:0", as_dict(recipe)))
    assert lorakit("inspect", path, "--recipe") == dump(recipe)


def test_no_recipe_is_an_error(kohya: Path, tmp_path: Path) -> None:
    save_file(load_file(kohya), tmp_path / "a.safetensors")
    with pytest.raises(LorakitError, match="holds no recipe"):
        CliRunner().invoke(app, ["inspect", str(tmp_path / "a.safetensors"), "--recipe"], catch_exceptions=False)


def test_a_published_models_kohya_file_becomes_peft_without_the_base(kohya: Path, tmp_path: Path) -> None:
    told = lorakit("convert", kohya, tmp_path / "peft", "--to", "peft")
    assert "kohya -> peft: 4 modules (float32)" in told
    back = lorakit("convert", tmp_path / "peft", tmp_path / "again.safetensors", "--to", "kohya")
    assert "largest |dW_in - dW_out| 0.00e+00" in back
    one, other = load_file(kohya), load_file(tmp_path / "again.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert lorakit("inspect", tmp_path / "peft", "--recipe") == dump(SD_RECIPE)


@pytest.fixture
def named(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """An adapter whose metadata name a base that is on this machine, and its changes."""
    base = tiny_llama(tmp_path / "base")
    models = open_base(resolve(str(base))).models
    layers = {path: layer for path, layer in adaptable(models["model"]).items() if path.endswith("q_proj")}
    changes = {path: random_delta(layer, 2, 3.0, torch.float32, dora=False, seed=0) for path, layer in layers.items()}
    state, injection = taken_apart(changes, models["model"])
    write_peft(tmp_path / "knows", state, injection, base_name=str(base), task="CAUSAL_LM")
    return base, changes


def test_the_base_is_asked_for_and_a_path_in_the_metadata_never_opened(
    named: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, changes = named
    lorakit("convert", tmp_path / "knows", tmp_path / "a.gguf", "--to", "gguf", "--base", base)
    told = json.loads(lorakit("inspect", tmp_path / "a.gguf", "--json"))
    assert (told["format"], told["family"], told["modules"], told["base"]) == ("gguf", "llama", 2, str(base))
    assert [block["name"] for block in told["blocks"]] == ["blk.0", "blk.1"]
    lorakit("convert", tmp_path / "a.gguf", tmp_path / "back", "--to", "peft", "--base", base)
    for path, delta in read_adapter(tmp_path / "back").components["model"].items():
        torch.testing.assert_close(product(delta), product(changes[path]), rtol=1e-6, atol=1e-6)
    opened = []
    read = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args, **more: opened.append(self) or read(self, *args, **more))
    for words in (
        ("convert", tmp_path / "knows", tmp_path / "c.gguf", "--to", "gguf"),
        ("convert", tmp_path / "a.gguf", tmp_path / "c", "--to", "peft"),
        ("resize", tmp_path / "a.gguf", tmp_path / "c.gguf", "--rank", "1"),
    ):
        with pytest.raises(LorakitError) as caught:
            CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert f"--base {base}" in caught.value.hint
    assert not [path for path in opened if path.is_relative_to(base)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "back", "base", "knows"]


def test_a_builtin_base_is_known_by_its_name(tmp_path: Path) -> None:
    models = open_base(resolve("builtin:mini-sd")).models
    layers = {path: layer for path, layer in adaptable(models["unet"]).items() if path.endswith("to_q")}
    changes = {path: random_delta(layer, 2, 3.0, torch.float32, dora=False, seed=0) for path, layer in layers.items()}
    state, injection = taken_apart(changes, models["unet"])
    write_peft(tmp_path / "a" / "unet", state, injection, base_name="builtin:mini-sd")
    told = lorakit("convert", tmp_path / "a", tmp_path / "a.safetensors", "--to", "kohya")
    assert f"{len(changes)} modules" in told


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_what_only_a_merge_takes_and_what_no_command_takes_is_told(tmp_path: Path) -> None:
    options = {"r": 4, "lora_alpha": 7, "use_rslora": True, "target_modules": ["q_proj"], "init_lora_weights": False}
    model = LlamaForCausalLM.from_pretrained(tiny_llama(tmp_path / "base", tied=False))
    peft = get_peft_model(model, LoraConfig(**options, modules_to_save=["lm_head"]))
    peft.save_pretrained(tmp_path / "adapter")
    told = json.loads(lorakit("inspect", tmp_path / "adapter", "--json"))
    assert told["beside"] == ["lm_head.weight"]
    assert told["faults"] == []
    assert [block["alphas"] for block in told["blocks"]] == [[7.0], [7.0]]
    assert "beside LoRA of layers: lm_head.weight" in lorakit("inspect", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": "pissa"}))
    (fault,) = json.loads(lorakit("inspect", tmp_path / "adapter", "--json"))["faults"]
    assert "init_lora_weights is 'pissa'" in fault


@pytest.mark.parametrize(
    ("strings", "base"),
    [
        ({"ss_sd_model_name": "v1-5-pruned.safetensors", "ss_base_model_version": "sd_v1"}, "v1-5-pruned.safetensors"),
        ({"ss_sd_model_name": "None", "ss_base_model_version": "sdxl_base_v1-0"}, "sdxl_base_v1-0"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "stable-diffusion-v1"),
        ({"ss_sd_model_name": "a.safetensors", "lorakit_base": "builtin:mini-sd sha256:0"}, "builtin:mini-sd"),
        ({"general.base_model.0.name": "Smol", "general.base_model.0.organization": "Some"}, "Some Smol"),
        (
            {"general.base_model.0.name": "Smol", "general.base_model.0.repo_url": "https://huggingface.co/some/smol"},
            "https://huggingface.co/some/smol",
        ),
        ({}, ""),
    ],
)
def test_other_programs_words_for_the_base(tmp_path: Path, strings: dict[str, str], base: str) -> None:
    """sd-scripts', modelspec's, and those of llama.cpp's converter."""
    if any(key.startswith("general.") for key in strings):
        path, writer = tmp_path / "a.gguf", GGUFWriter(tmp_path / "a.gguf", "llama")
        for key, text in {"general.type": "adapter", "adapter.type": "lora", **strings}.items():
            writer.add_string(key, text)
        for letter in ("a", "b"):
            writer.add_tensor(f"blk.0.attn_q.weight.lora_{letter}", np.ones((1, 1), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    else:
        path, name = tmp_path / "a.safetensors", "lora_unet_conv_in"
        save_file({f"{name}.lora_{end}.weight": torch.ones(1, 1) for end in ("down", "up")}, path, strings)
    assert json.loads(lorakit("inspect", path, "--json"))["base"] == base
    assert (f"made for {base}" if base else "names no base") in lorakit("inspect", path)

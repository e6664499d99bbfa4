"""What lorakit writes, as diffusers, PEFT and gguf read it; and the names of the published models."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import PeftModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, LlamaForCausalLM

from lorakit.adapters.convert import convert
from lorakit.adapters.delta import Delta, SavedAdapter, product
from lorakit.adapters.files import read_adapter
from lorakit.adapters.formats import kohya_names, kohya_table
from lorakit.adapters.known import known_models, recognise
from lorakit.adapters.outline import adaptable
from lorakit.adapters.sgm import original_paths
from tests.adapters.test_convert import random_delta
from tests.tiny import tiny_gguf, tiny_llama, tiny_sd, tiny_sdxl

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
LAYERS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"),
    "text mlp": ("to_q", "out_proj", "fc1", "fc2"),
    "blocks": ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "time_emb_proj"),
    "scaling": ("downsamplers.0.conv", "upsamplers.0.conv", "conv1"),
}
SDXL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {"sd": tiny_sd(root / "sd"), "sdxl": tiny_sdxl(root / "sdxl"), "llama": tiny_llama(root / "llama")}


def pipeline(bases: dict[str, Path], kind: str) -> Any:
    opened: Any = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    return opened.from_pretrained(bases[kind])


def components(pipe: Any) -> dict[str, nn.Module]:
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}


def random_adapter(models: dict[str, nn.Module], ends: tuple[str, ...], *, mixed: bool, dora: bool) -> SavedAdapter:
    found: dict[str, dict[str, Delta]] = {}
    for component, model in models.items():
        chosen = {path: layer for path, layer in adaptable(model).items() if path.endswith(ends)}
        for number, (path, layer) in enumerate(chosen.items()):
            rank, alpha = (2 + number % 3, 1.5 + number % 2) if mixed else (4, 2.0)
            delta = random_delta(layer, rank, alpha, torch.float32, dora=dora, seed=number)
            found.setdefault(component, {})[path] = Delta(0.1 * delta.A, delta.B, delta.scale, delta.magnitude)
    return SavedAdapter("sd", found, "peft", {})


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize(
    ("which", "mixed"), [("attention", False), ("text mlp", True), ("blocks", True), ("scaling", False)]
)
def test_diffusers_reads_the_file(
    bases: dict[str, Path], tmp_path: Path, kind: str, form: Any, which: str, mixed: bool
) -> None:
    theirs = pipeline(bases, kind)
    saved = random_adapter(components(theirs), LAYERS[which], mixed=mixed, dora=False)
    path = tmp_path / "style.safetensors"
    convert(saved, path, form, models=components(theirs), base_name="tiny")
    theirs.load_lora_weights(path)
    for component, changes in saved.components.items():
        model = getattr(theirs, component)
        for module, delta in changes.items():
            change = model.get_submodule(module).get_delta_weight("default_0")
            torch.testing.assert_close(change, product(delta), rtol=1e-5, atol=1e-6, msg=f"{component}.{module}")
        wrapped = [name for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")]
        assert sorted(wrapped) == sorted(changes)


def test_diffusers_predicts_with_kohyas_file_what_added_weights_predict(bases: dict[str, Path], tmp_path: Path) -> None:
    theirs, ours = pipeline(bases, "sdxl"), pipeline(bases, "sdxl")
    saved = random_adapter({"unet": ours.unet}, (*LAYERS["attention"], *LAYERS["blocks"]), mixed=True, dora=False)
    convert(saved, tmp_path / "a.safetensors", "kohya", models=components(ours), base_name="tiny")
    theirs.load_lora_weights(tmp_path / "a.safetensors")
    inputs = (torch.randn(1, 4, 16, 16), 7, torch.randn(1, 5, 192))
    added = {"text_embeds": torch.randn(1, 128), "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    with torch.no_grad():
        before = ours.unet(*inputs, added_cond_kwargs=added).sample
        for path, delta in saved.components["unet"].items():
            ours.unet.get_submodule(path).weight += product(delta)
        expected = ours.unet(*inputs, added_cond_kwargs=added).sample
        found = theirs.unet(*inputs, added_cond_kwargs=added).sample
    assert float((before - expected).abs().max()) > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_diffusers_reads_dora(bases: dict[str, Path], tmp_path: Path) -> None:
    """From its own format; from kohya's, diffusers 0.42 leaves the magnitudes out."""
    theirs, ours = pipeline(bases, "sdxl"), pipeline(bases, "sdxl")
    saved = random_adapter(components(ours), LAYERS["attention"], mixed=False, dora=True)
    convert(saved, tmp_path / "a.safetensors", "diffusers", models=components(ours), base_name="tiny")
    theirs.load_lora_weights(tmp_path / "a.safetensors")
    theirs.fuse_lora(components=list(components(theirs)))
    assert saved.components.keys() == {"unet", "text_encoder", "text_encoder_2"}
    for component, changes in saved.components.items():
        for path, delta in changes.items():
            assert delta.magnitude is not None
            total = components(ours)[component].get_submodule(path).weight + product(delta)
            expected = total * (delta.magnitude / torch.linalg.vector_norm(total, dim=1))[:, None]
            found = components(theirs)[component].get_submodule(path).base_layer.weight
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=f"{component} {path}")


def test_peft_opens_every_component(bases: dict[str, Path], tmp_path: Path) -> None:
    theirs = components(pipeline(bases, "sdxl"))
    saved = random_adapter(theirs, (*LAYERS["attention"], "conv1", "fc1"), mixed=True, dora=False)
    convert(saved, tmp_path / "a", "peft", models=theirs, base_name="tiny")
    for component, changes in saved.components.items():
        model = PeftModel.from_pretrained(theirs[component], tmp_path / "a" / component)
        for path, delta in changes.items():
            layer: Any = model.base_model.model.get_submodule(path)
            torch.testing.assert_close(layer.get_delta_weight("default"), product(delta), rtol=1e-5, atol=1e-6)


def test_peft_merges_dora_of_linear_layers_and_convolutions(bases: dict[str, Path], tmp_path: Path) -> None:
    theirs, ours = (components(pipeline(bases, "sdxl"))["unet"] for _ in range(2))
    saved = random_adapter({"unet": ours}, ("to_q", "conv1"), mixed=True, dora=True)
    convert(saved, tmp_path / "a", "peft", models={"unet": ours}, base_name="tiny")
    merged: Any = PeftModel.from_pretrained(theirs, tmp_path / "a" / "unet").merge_and_unload()
    for path, delta in saved.components["unet"].items():
        assert delta.magnitude is not None
        total = ours.get_submodule(path).weight + product(delta)
        rows = (-1, *[1] * (total.dim() - 1))
        norm = torch.linalg.vector_norm(total.flatten(1), dim=1)
        expected = total * (delta.magnitude / norm).reshape(rows)
        torch.testing.assert_close(merged.get_submodule(path).weight, expected, rtol=1e-4, atol=1e-5)


def test_gguf_adds_up_with_the_gguf_base(tmp_path: Path) -> None:
    """A base in GGUF + B A of the GGUF LoRA is the GGUF of the base with B A added: q and k rows go along."""
    base = tiny_gguf(tmp_path / "base.gguf")
    folder = tmp_path / "base-folder"
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    layers = {path: layer for path, layer in adaptable(model).items() if path != "lm_head"}
    changes = {
        path: random_delta(layer, 2 + number % 3, 3.0, torch.float32, dora=False, seed=number)
        for number, (path, layer) in enumerate(layers.items())
    }
    saved = SavedAdapter("llama", {"model": changes}, "peft", {})
    convert(saved, tmp_path / "a.gguf", "gguf", models={"model": model}, base_name="tiny")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    lora = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    alpha = reader.fields["adapter.lora.alpha"].contents()
    texts = {key: reader.fields[key].contents() for key in ("general.type", "adapter.type", "general.architecture")}
    assert texts == {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama"}
    weights = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(base).tensors}
    assert len(lora) == 2 * len(changes)
    for name in {key.rpartition(".")[0] for key in lora}:
        a, b = lora[f"{name}.lora_a"], lora[f"{name}.lora_b"]
        weights[name] = weights[name] + alpha / a.shape[0] * (b @ a)
    for path, delta in changes.items():
        layers[path].weight.data += product(delta)
    model.save_pretrained(folder)
    again = tiny_gguf(tmp_path / "again.gguf", model=folder)
    for tensor in gguf.GGUFReader(again).tensors:
        np.testing.assert_allclose(np.array(tensor.data), weights[tensor.name], rtol=1e-5, atol=1e-5)


def test_the_published_models_have_as_many_layers_as_their_adapters() -> None:
    """kohya's own adapters: SD 1.5 attention 128 + text encoder 72, SDXL attention 560, text encoders 72 and 192."""
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    with torch.device("meta"):
        first: dict[str, Any] = {"unet": UNet2DConditionModel(cross_attention_dim=768)}
        first["text_encoder"] = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_hidden_layers=12))
        xl: dict[str, Any] = {"unet": UNet2DConditionModel(**SDXL_UNET)}
        xl["text_encoder"] = first["text_encoder"]
        big = CLIPTextConfig(hidden_size=1280, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280)
        xl["text_encoder_2"] = CLIPTextModelWithProjection(big)
    for models, counts in ((first, (128, 72, 0)), (xl, (560, 72, 192))):
        names = kohya_names({component: list(adaptable(model)) for component, model in models.items()})
        attention = [path for component, path in names if component == "unet" and path.endswith(ends)]
        text = [name for name in names.values() if name.startswith(("lora_te_text", "lora_te1_text"))]
        second = [name for name in names.values() if name.startswith("lora_te2_text_model")]
        assert (len(attention), len(text), len(second)) == counts
        table = kohya_table({component: list(adaptable(model)) for component, model in models.items()})
        assert all(table[name] == place for place, name in names.items())
    assert {tuple(p.shape) for p in known_models("sdxl_base_v1-0")["unet"].parameters()} == {
        tuple(p.shape) for p in xl["unet"].parameters()
    }


def test_original_names_of_sdxl() -> None:
    with torch.device("meta"):
        names = original_paths(list(adaptable(UNet2DConditionModel(**SDXL_UNET))))
    block = "transformer_blocks.9.attn2.to_out.0"
    expected = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
        "down_blocks.1.attentions.1.proj_in": "input_blocks.5.1.proj_in",
        f"down_blocks.2.attentions.1.{block}": f"input_blocks.8.1.{block}",
        "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
        f"mid_block.attentions.0.{block}": f"middle_block.1.{block}",
        "up_blocks.0.resnets.2.time_emb_proj": "output_blocks.2.0.emb_layers.1",
        f"up_blocks.0.attentions.2.{block}": f"output_blocks.2.1.{block}",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "up_blocks.2.resnets.2.conv1": "output_blocks.8.0.in_layers.2",
    }
    assert {path: names[path] for path in expected} == expected
    assert len(set(names.values())) == len(names)


def test_diffusers_names_in_a_kohya_file_for_sdxl_are_read_too(bases: dict[str, Path], tmp_path: Path) -> None:
    models = components(pipeline(bases, "sdxl"))
    saved = random_adapter({"unet": models["unet"]}, LAYERS["attention"], mixed=True, dora=False)
    convert(saved, tmp_path / "a.safetensors", "kohya", models=models, base_name="")
    from safetensors.torch import load_file, save_file

    names = kohya_names({component: list(adaptable(model)) for component, model in models.items()})
    plain = {name: f"lora_unet_{path.replace('.', '_')}" for (_, path), name in names.items()}
    tensors = {
        f"{plain[key.split('.')[0]]}.{key.partition('.')[2]}": tensor
        for key, tensor in load_file(tmp_path / "a.safetensors").items()
    }
    save_file(tensors, tmp_path / "b.safetensors")
    one, other = (read_adapter(tmp_path / name, models).all_deltas() for name in ("a.safetensors", "b.safetensors"))
    assert one.keys() == other.keys()
    assert all(torch.equal(product(one[place]), product(other[place])) for place in one)


@pytest.mark.parametrize("version", ["sd_v1", "sd_v2", "sdxl_base_v1-0"])
def test_a_published_models_adapter_is_recognised(version: Any) -> None:
    layers = adaptable(known_models(version)["unet"])
    path = next(path for path in layers if path.endswith("attn2.to_k"))
    width = layers[path].in_features
    assert recognise({f"lora_unet_{path.replace('.', '_')}.lora_down.weight": torch.zeros(4, width)}) == version
    assert recognise({f"unet.{path}.lora_A.weight": torch.zeros(4, width)}) == version
    assert recognise({f"unet.{path}.lora_A.weight": torch.zeros(4, 40)}) is None
    layer = "layers.0.self_attn.q_proj.lora_A.weight"
    encoder = {f"text_encoder.text_model.encoder.{layer}": torch.zeros(4, 1024 if version == "sd_v2" else 768)}
    assert recognise({**encoder, f"unet.{path}.lora_A.weight": torch.zeros(4, width)}) == version
    second = {f"text_encoder_2.text_model.encoder.{layer}": torch.zeros(4, 1280)}
    assert recognise({**encoder, **second}) == "sdxl_base_v1-0"

"""Adapters written by lorakit and read by PEFT and diffusers, and the other way round; broken ones refused by name."""

import hashlib
import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaForCausalLM

from lorakit.adapters.delta import product
from lorakit.adapters.files import read_adapter
from lorakit.adapters.formats import kohya_names, kohya_table
from lorakit.adapters.inject import adapter_state, apply, inject, load_adapter_state
from lorakit.adapters.outline import adaptable
from lorakit.adapters.reduce import resize
from lorakit.adapters.targets import Injection
from lorakit.adapters.write import deltas, write_kohya, write_peft
from lorakit.errors import ModelError
from lorakit.recipe.schema import Adapter, LlamaAdapter
from tests.tiny import tiny_llama, tiny_sd

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
ATTENTION = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj")}
UNET = {"attention": ("to_q", "to_k", "to_v", "to_out.0")}
CLIP = {"attention": ("q_proj", "k_proj", "v_proj", "out_proj")}
TOKENS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("sd"))


def disturbed(model: nn.Module, adapter: Adapter, groups: dict[str, tuple[str, ...]]) -> Injection:
    """LoRA with random tensors in the model."""
    injection = inject(model, adapter, groups, seed=0)
    generator = torch.Generator().manual_seed(1)
    state = {key: t + 0.3 * torch.randn(t.shape, generator=generator) for key, t in adapter_state(model).items()}
    load_adapter_state(model, state)
    return injection


def parts(sd: Path) -> dict[str, nn.Module]:
    return {
        "unet": UNet2DConditionModel.from_pretrained(sd / "unet"),
        "text_encoder": CLIPTextModel.from_pretrained(sd / "text_encoder"),
    }


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


ADAPTERS = {
    "plain": Adapter(rank=4, alpha=8),
    "dora": Adapter(rank=4, alpha=6, dora=True),
    "rslora": Adapter(rank=4, alpha=6, rslora=True, alpha_pattern={"k_proj": 2.5}),
    "patterns": LlamaAdapter(rank=4, alpha=3, rank_pattern={"v_proj": 2, "layers.1.*": 3}, layers=[1]),
    "linear": Adapter(rank=2, targets="all-linear"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_peft_loads_what_we_write(llama: Path, tmp_path: Path, kind: str) -> None:
    model = LlamaForCausalLM.from_pretrained(llama)
    injection = disturbed(model, ADAPTERS[kind], ATTENTION)
    write_peft(tmp_path, adapter_state(model), injection, base_name="builtin:x", task="CAUSAL_LM", metadata={"a": "b"})
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=2e-5)
    ours = LlamaForCausalLM.from_pretrained(llama)
    saved = read_adapter(tmp_path, {"model": ours})
    assert (saved.family, saved.format) == ("llama", "peft")
    assert saved.metadata == {"format": "pt", "a": "b", "base_model_name_or_path": "builtin:x"}
    apply(ours, saved.components["model"], weight=1, name="a")
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-6, atol=1e-6)


def test_we_read_what_peft_writes(llama: Path, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=7,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 3},
        alpha_pattern={r"layers\.0\.self_attn\.q_proj": 2},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    theirs = get_peft_model(LlamaForCausalLM.from_pretrained(llama), config)
    theirs.save_pretrained(tmp_path)
    saved = read_adapter(tmp_path)
    assert saved.components["model"]["model.layers.0.self_attn.q_proj"].scale == 2 / 4
    assert saved.components["model"]["model.layers.1.self_attn.v_proj"].scale == 7 / 3
    ours = LlamaForCausalLM.from_pretrained(llama)
    apply(ours, read_adapter(tmp_path, {"model": ours}).components["model"], weight=1, name="a")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-6, atol=1e-6)


def test_sd_peft_folder(sd: Path, tmp_path: Path) -> None:
    models = parts(sd)
    injections = {
        "unet": disturbed(models["unet"], Adapter(rank=4), UNET),
        "text_encoder": disturbed(models["text_encoder"], Adapter(rank=4), CLIP),
    }
    for name, injection in injections.items():
        write_peft(tmp_path / "adapter" / name, adapter_state(models[name]), injection, base_name=str(sd))
    theirs = PeftModel.from_pretrained(parts(sd)["unet"], tmp_path / "adapter" / "unet")
    latents, states = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 32)
    with torch.no_grad():
        assert torch.equal(theirs(latents, 5, states).sample, models["unet"](latents, 5, states).sample)
    saved = read_adapter(tmp_path, parts(sd))
    assert saved.family == "sd"
    for name, injection in injections.items():
        expected = deltas(adapter_state(models[name]), injection)
        assert saved.components[name].keys() == expected.keys()
        assert all(torch.equal(product(saved.components[name][k]), product(d)) for k, d in expected.items())


@pytest.mark.parametrize("adapter", [Adapter(rank=4, alpha=6), Adapter(rank=4, rank_pattern={"to_q": 2}, rslora=True)])
def test_kohya_file_is_read_by_diffusers(sd: Path, tmp_path: Path, adapter: Adapter) -> None:
    models = parts(sd)
    injections = {
        "unet": disturbed(models["unet"], adapter, UNET),
        "text_encoder": disturbed(models["text_encoder"], Adapter(rank=3, alpha=2), CLIP),
    }
    changes = {name: deltas(adapter_state(models[name]), injection) for name, injection in injections.items()}
    path = tmp_path / "style.safetensors"
    known = {"title": "style", "version": "sd_v1", "prediction_type": "epsilon", "resolution": 64}
    write_kohya(path, changes, models=models, **known)

    pipeline = StableDiffusionPipeline.from_pretrained(sd)
    pipeline.load_lora_weights(path)
    fresh = parts(sd)
    for name, theirs in (("unet", pipeline.unet), ("text_encoder", pipeline.text_encoder)):
        for module, delta in changes[name].items():
            layer = theirs.get_submodule(module)
            torch.testing.assert_close(layer.get_delta_weight("default_0"), product(delta), rtol=1e-5, atol=1e-6)
        wrapped = [m for m, layer in theirs.named_modules() if hasattr(layer, "get_delta_weight")]
        assert sorted(wrapped) == sorted(changes[name])
    saved = read_adapter(path, fresh)
    assert saved.format == "kohya"
    for name in changes:
        assert saved.components[name].keys() == changes[name].keys()
        for key, delta in changes[name].items():
            torch.testing.assert_close(product(saved.components[name][key]), product(delta), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bare", [False, True])
def test_kohya_files_by_diffusers_own_converter_are_read(sd: Path, tmp_path: Path, bare: bool) -> None:
    """Alphas as integers, a single text encoder called te1, and, by newer versions, without ``text_model``."""
    models = parts(sd)
    modules = [name for name, _ in models["text_encoder"].named_modules() if name.endswith("self_attn.q_proj")]
    tensors = {}
    for module in modules:
        path = module.removeprefix("text_model.")
        name = f"text_encoder.{path}" if bare else f"text_encoder.text_model.{path}"
        tensors |= {f"{name}.lora_A.weight": torch.randn(2, 32), f"{name}.lora_B.weight": torch.randn(32, 2)}
    converted = convert_state_dict_to_kohya(tensors)
    assert any(key.startswith("lora_te1_") and value.dtype == torch.int64 for key, value in converted.items())
    save_file(converted, tmp_path / "x.safetensors")
    saved = read_adapter(tmp_path / "x.safetensors", models)
    assert set(saved.components["text_encoder"]) == set(modules)
    assert {delta.scale for delta in saved.components["text_encoder"].values()} == {1.0}


def test_an_adapter_may_have_more_ranks_than_its_layer_inputs(sd: Path, tmp_path: Path) -> None:
    """PEFT writes and loads such ones; one of the same change has no more than the layer allows."""
    name = "lora_unet_conv_out"
    down, up = torch.randn(16, 32, 3, 3), torch.randn(4, 16, 1, 1)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "x.safetensors")
    saved = read_adapter(tmp_path / "x.safetensors", parts(sd))
    smaller, kept = resize(saved, 8)
    (before,), (after,) = (x.components["unet"].values() for x in (saved, smaller))
    torch.testing.assert_close(product(before), torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down))
    torch.testing.assert_close(product(after), product(before), rtol=1e-4, atol=1e-4)
    assert (after.rank, round(kept.share, 6)) == (4, 1.0)


def test_kohya_metadata_and_names(sd: Path, tmp_path: Path) -> None:
    models = parts(sd)
    injection = disturbed(models["unet"], Adapter(rank=4, alpha=2), UNET)
    path = tmp_path / "style.safetensors"
    changes = {"unet": deltas(adapter_state(models["unet"]), injection)}
    known = {"title": "style", "version": "sd_v1", "prediction_type": "epsilon", "resolution": 64}
    write_kohya(path, changes, models=models, **known)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    content = path.read_bytes()
    body = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_network_alpha"] == "2.0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.title"] == "style"
    tensors = load_file(path)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert tensors[f"{name}.lora_down.weight"].shape == (4, 32)
    assert tensors[f"{name}.alpha"].shape == ()
    assert tensors[f"{name}.alpha"].dtype == torch.float32
    assert len(tensors) == 3 * len(injection.targets)


def test_names_of_stable_diffusion_1_5() -> None:
    """Module counts and names that kohya's own SD 1.5 adapters have."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_hidden_layers=12))
    table = kohya_table({"unet": adaptable(unet), "text_encoder": adaptable(text)})
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    attention = [n for n, (c, p) in table.items() if c == "unet" and p.endswith(ends) and "put_blocks" not in n]
    assert len([name for name in attention if "middle_block" not in name]) == 128
    assert len([n for n in table if n.startswith("lora_te_text_model_encoder_layers_")]) == 72
    assert set(kohya_names({"text_encoder": ["text_model.encoder.layers.3.mlp.fc1"]}).values()) <= set(table)
    assert table["lora_unet_mid_block_attentions_0_proj_in"] == ("unet", "mid_block.attentions.0.proj_in")


COMFY = {
    "diffusion_model.input_blocks.1.1.proj_in": ("unet", "down_blocks.0.attentions.0.proj_in"),
    "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q": (
        "unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    ),
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj": (
        "text_encoder", "encoder.layers.0.self_attn.q_proj",
    ),
}  # fmt: skip
"""ComfyUI's names of layers, which OneTrainer writes too."""


@pytest.mark.parametrize("ends", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
def test_comfyuis_own_names(sd: Path, tmp_path: Path, ends: tuple[str, str]) -> None:
    path, models, tensors = tmp_path / "x.safetensors", parts(sd), {}
    for name, (component, module) in COMFY.items():
        layer = adaptable(models[component])[module]
        down, up = (torch.randn(shape) for shape in ((2, layer.weight.shape[1]), (layer.weight.shape[0], 2)))
        tensors |= {f"{name}.{ends[0]}.weight": down, f"{name}.{ends[1]}.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    found = read_adapter(path, models).components
    assert {(c, m.removeprefix("text_model.")) for c in found for m in found[c]} == set(COMFY.values())
    assert {delta.scale for deltas in found.values() for delta in deltas.values()} == {0.5}
    save_file(tensors | {"bundle_emb.dog.clip_l": torch.zeros(1, 32)}, path)
    with pytest.raises(ModelError, match="an embedding is bundled"):
        read_adapter(path, models)


def test_kohya_linear_for_a_convolution_and_dora(sd: Path, tmp_path: Path) -> None:
    path, name = tmp_path / "x.safetensors", "lora_unet_down_blocks_0_attentions_0_proj_in"
    down, up, scale = torch.randn(2, 32), torch.randn(32, 2), torch.rand(32, 1, 1, 1)
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.dora_scale": scale}
    save_file(tensors, path)
    (delta,) = read_adapter(path, parts(sd)).components["unet"].values()
    assert delta.A.shape == (2, 32, 1, 1)
    assert delta.scale == 1
    assert delta.magnitude is not None
    assert torch.equal(delta.magnitude, scale.flatten())
    save_file(tensors | {f"{name}.dora_scale": torch.rand(1, 32)}, path)
    with pytest.raises(ModelError, match="on the output"):
        read_adapter(path, parts(sd))


@pytest.mark.parametrize("with_metadata", [True, False])
def test_diffusers_file(sd: Path, tmp_path: Path, with_metadata: bool, caplog: pytest.LogCaptureFixture) -> None:
    unet = parts(sd)["unet"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    unet.add_adapter(config)
    metadata = {"unet_lora_adapter_metadata": config.to_dict()} if with_metadata else {}
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(unet), **metadata)
    with caplog.at_level(logging.WARNING, "lorakit"):
        saved = read_adapter(tmp_path / "pytorch_lora_weights.safetensors", parts(sd))
    assert saved.format == "diffusers"
    assert bool(caplog.records) != with_metadata
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
    expected = unet.get_submodule(path).get_delta_weight("default") / (1 if with_metadata else 2)
    torch.testing.assert_close(product(saved.components["unet"][path]), expected)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_unet_saved_alone_by_diffusers(
    sd: Path, tmp_path: Path, rslora: bool, caplog: pytest.LogCaptureFixture
) -> None:
    unet = parts(sd)["unet"]
    names = ["to_q", "conv_in", "time_embedding.linear_1"]
    ranks = {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 2}
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=names, rank_pattern=ranks, use_rslora=rslora, init_lora_weights=False
    )
    unet.add_adapter(config)
    unet.save_lora_adapter(tmp_path)
    with caplog.at_level(logging.WARNING, "lorakit"):
        saved = read_adapter(tmp_path, parts(sd)).components["unet"]
    assert not [record for record in caplog.records if record.name == "lorakit"]
    assert {"conv_in", "time_embedding.linear_1", *ranks} < set(saved)
    for path, delta in saved.items():
        expected = unet.get_submodule(path).get_delta_weight("default")
        torch.testing.assert_close(product(delta).view(expected.shape), expected)


OLD_BLOCK = "mid_block.attentions.0.transformer_blocks.0.attn1"


@pytest.mark.parametrize("prefix", ["unet", None])
def test_old_diffusers_names(sd: Path, tmp_path: Path, prefix: str | None) -> None:
    name = f"{prefix}.{OLD_BLOCK}" if prefix else OLD_BLOCK
    tensors = {
        f"{name}.processor.to_out_lora.down.weight": torch.randn(2, 64),
        f"{name}.processor.to_out_lora.up.weight": torch.randn(64, 2),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    components = read_adapter(tmp_path / "x.safetensors", parts(sd)).components
    [(layer, delta)] = components.pop("unet").items()
    assert not components
    assert layer == f"{OLD_BLOCK}.to_out.0"
    unet = parts(sd)["unet"]
    unet.load_lora_adapter(tensors, prefix=prefix, adapter_name="a")
    torch.testing.assert_close(product(delta), unet.get_submodule(layer).get_delta_weight("a"))


@pytest.mark.parametrize("tail", ["q_proj.lora_linear_layer", "to_q_lora"])
def test_old_diffusers_names_of_a_text_encoder(sd: Path, tmp_path: Path, tail: str) -> None:
    name = f"text_encoder.text_model.encoder.layers.0.self_attn.{tail}"
    tensors = {f"{name}.down.weight": torch.randn(2, 32), f"{name}.up.weight": torch.randn(32, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    [(layer, delta)] = read_adapter(tmp_path / "x.safetensors", parts(sd)).components["text_encoder"].items()
    assert layer == "encoder.layers.0.self_attn.q_proj"
    assert torch.equal(product(delta), tensors[f"{name}.up.weight"] @ tensors[f"{name}.down.weight"])


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def written(llama: Path, tmp_path: Path) -> Path:
    model = LlamaForCausalLM.from_pretrained(llama)
    injection = disturbed(model, Adapter(rank=4), ATTENTION)
    write_peft(tmp_path / "a", adapter_state(model), injection, base_name="x", task="CAUSAL_LM")
    return tmp_path / "a"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{Q}.lora_A.weight": None}, rf"{Q}.lora_B.weight: its A is missing"),
        ({f"{Q}.lora_A.weight": torch.zeros(4, 16)}, "model.layers.0.self_attn.q_proj: the adapter is for a weight"),
        ({f"{Q}.lora_A.weight": torch.zeros(5, 32)}, f"{Q}.lora_A.weight: .*do not multiply"),
        ({f"{Q}.lora_B.weight": torch.full((32, 4), torch.inf)}, rf"{Q}.lora_B.weight: NaN or infinity"),
        ({f"{Q}.lora_C.weight": torch.zeros(1)}, f"{Q}.lora_C.weight: not a part of LoRA"),
        ({f"{Q}.lora_A.weight": None, f"{Q}.lora_B.weight": None}, "the configuration targets it"),
        ({"lora_unet_x.lora_down.weight": torch.zeros(1)}, "several formats"),
        ({"x": torch.zeros(1)}, "no known adapter format"),
        ({f"{Q}9.lora_A.weight": torch.ones(4, 32), f"{Q}9.lora_B.weight": torch.ones(32, 4)}, "no such module"),
        (
            {
                f"base_model.model.{Q}.lora_A.weight": torch.ones(4, 32),
                f"base_model.model.{Q}.lora_B.weight": torch.ones(32, 4),
            },
            "base_model.model.model.layers.0.self_attn.q_proj: the base has no such module",
        ),
        ({f"{Q}.lora_magnitude_vector": torch.tensor(1.0)}, r"magnitudes \(\) for 32 outputs"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)}, "its numbers are I8"),
    ],
)
def test_broken_weights(written: Path, llama: Path, change: dict[str, torch.Tensor | None], message: str) -> None:
    file = written / "adapter_model.safetensors"
    tensors = load_file(file) | change
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(ModelError, match=message):
        read_adapter(written, {"model": LlamaForCausalLM.from_pretrained(llama)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"r": 8}, "the configuration says otherwise"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "magnitude is missing"),
    ],
)
def test_broken_configuration(written: Path, change: dict[str, object], message: str) -> None:
    file = written / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelError, match=message):
        read_adapter(written)


def test_a_kohya_file_for_a_language_model(llama: Path, tmp_path: Path) -> None:
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1, 1)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="made for a Stable Diffusion model, which the base is not"):
        read_adapter(tmp_path / "x.safetensors", {"model": LlamaForCausalLM.from_pretrained(llama)})


def test_not_adapters(tmp_path: Path, written: Path, sd: Path) -> None:
    (written / "adapter_model.safetensors").rename(written / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        read_adapter(written)
    with pytest.raises(ModelError, match="pickle"):
        read_adapter(written / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"no adapter_config.json"):
        read_adapter(sd)
    with pytest.raises(ModelError, match="no such file"):
        read_adapter(tmp_path / "none.safetensors")
    path = tmp_path / "x.safetensors"
    for key, message in (
        ("lora_te2_text_model_x.alpha", "XL"),
        ("lora_unet_input_blocks_8_1_transformer_blocks_9_attn1_to_q.alpha", "XL"),
        ("lora_unet_x.hada_w1_a", r"LoHa \(LyCORIS\)"),
        ("lora_unet_x.lokr_w1", r"LoKr \(LyCORIS\)"),
        ("lycoris_unet_x.lokr_w1", r"LoKr \(LyCORIS\)"),
        ("lora_unet_x.a1.weight", r"GLoRA \(LyCORIS\)"),
        ("lora_unet_norm.b_norm", r"trained norms \(LyCORIS\)"),
        ("lora_unet_nothing.alpha", "no such module"),
        ("diffusion_model.middle_block.1.norm.diff_b", r"a full difference of weights \(LyCORIS\)"),
        ("model.diffusion_model.middle_block.1.proj_in.lora_A.weight", "a key of no known adapter format"),
    ):
        save_file({key: torch.ones(1)}, path)
        with pytest.raises(ModelError, match=message):
            read_adapter(path, parts(sd))


def test_another_kind_is_told_whatever_comes_before_it(tmp_path: Path, sd: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"lora_unet_x.a": torch.ones(1), "lora_unet_x.on_input": torch.ones(1, dtype=torch.bool)}, path)
    with pytest.raises(ModelError, match=r"\(IA\)\^3 \(LyCORIS\)"):
        read_adapter(path, parts(sd))


@pytest.mark.parametrize(
    "ends",
    [("lora_down.weight", "lora_up.weight", "alpha"), ("lora_A.weight", "lora_B.weight", "alpha")],
    ids=["kohya's parts", "an alpha beside PEFT's"],
)
def test_diffusers_names_with_parts_of_other_programs(tmp_path: Path, sd: Path, ends: tuple[str, str, str]) -> None:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    values = (torch.randn(2, 64), torch.randn(64, 2), torch.tensor(6.0))
    save_file({f"{name}.{end}": value for end, value in zip(ends, values, strict=True)}, tmp_path / "x.safetensors")
    (delta,) = read_adapter(tmp_path / "x.safetensors", parts(sd)).components["unet"].values()
    torch.testing.assert_close(product(delta), 3.0 * values[1] @ values[0])


def test_the_name_of_an_adapter_inside_peft_is_no_matter(llama: Path, written: Path) -> None:
    weights = written / "adapter_model.safetensors"
    expected = read_adapter(written)
    save_file({key.replace(".weight", ".default.weight"): t for key, t in load_file(weights).items()}, weights)
    found = read_adapter(written, {"model": LlamaForCausalLM.from_pretrained(llama)})
    for place, delta in expected.all_deltas().items():
        assert torch.equal(product(found.all_deltas()[place]), product(delta))


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_peft_folder_of_one_component(tmp_path: Path, sd: Path, component: str) -> None:
    """As PEFT saves a model that knows nothing of its place in a pipeline."""
    names = ["to_q"] if component == "unet" else ["q_proj"]
    theirs = get_peft_model(parts(sd)[component], LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    saved = read_adapter(tmp_path, parts(sd))
    assert list(saved.components) == [component]
    assert saved.family == "sd"


def test_dora_on_the_inputs_of_a_square_convolution_is_refused(tmp_path: Path, sd: Path) -> None:
    """LyCORIS' wd_on_out=False: [1, in, 1, 1], which PEFT's magnitude of a convolution looks like, and is not."""
    layers = adaptable(parts(sd)["unet"])
    path = next(p for p, m in layers.items() if isinstance(m, nn.Conv2d) and m.in_channels == m.out_channels)
    width, kernel = layers[path].in_channels, layers[path].kernel_size
    name = f"lora_unet_{path.replace('.', '_')}"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(2, width, *kernel),
        f"{name}.lora_up.weight": torch.randn(width, 2, 1, 1),
        f"{name}.alpha": torch.tensor(2.0),
    }
    for shape, refused in (((1, width, 1, 1), True), ((width, 1, 1, 1), False)):
        save_file(tensors | {f"{name}.dora_scale": torch.rand(shape)}, tmp_path / "x.safetensors")
        if not refused:
            assert read_adapter(tmp_path / "x.safetensors", parts(sd)).components["unet"][path].magnitude is not None
            continue
        with pytest.raises(ModelError, match="only DoRA on the output"):
            read_adapter(tmp_path / "x.safetensors", parts(sd))

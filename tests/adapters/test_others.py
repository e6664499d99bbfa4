"""Adapters as other programs leave them: alphas, parts and names that lorakit itself does not write."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from gguf import GGMLQuantizationType, GGUFWriter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, LlamaForCausalLM

from lorakit.adapters.convert import convert
from lorakit.adapters.delta import product
from lorakit.adapters.files import read_adapter
from lorakit.adapters.inject import apply
from lorakit.adapters.outline import adaptable
from lorakit.adapters.pieces import open_pieces
from lorakit.errors import ModelError
from tests.adapters.test_files import llama, logits, parts, sd
from tests.tiny import tiny_sdxl

__all__ = ["llama", "sd"]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.nn.Module]:
    base = tiny_sdxl(tmp_path_factory.mktemp("sdxl"))
    return {
        "unet": UNet2DConditionModel.from_pretrained(base / "unet"),
        "text_encoder": CLIPTextModel.from_pretrained(base / "text_encoder"),
        "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(base / "text_encoder_2"),
    }


@pytest.mark.parametrize("alpha", [-3.0, 0.0])
def test_a_negative_alpha_counts_as_programs_count_it_and_comes_back(sd: Path, tmp_path: Path, alpha: float) -> None:
    """alpha / rank, as PEFT and diffusers count. 0 is not written: some take the rank for it, some no change."""
    path, models = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k", parts(sd)
    down, up, tensors = torch.randn(2, 32), torch.randn(64, 2), {}
    for number, own in enumerate((alpha, 5.0)):
        name = f"lora_unet_{path.replace('.', '_')[:-1]}{'kv'[number]}"
        tensors |= {
            f"{name}.lora_down.weight": down.clone(),
            f"{name}.lora_up.weight": up.clone(),
            f"{name}.alpha": torch.tensor(own),
        }
    save_file(tensors, tmp_path / "a.safetensors")
    saved = read_adapter(tmp_path / "a.safetensors", models)
    expected = alpha / 2 * (up.double() @ down.double())
    for form, out in (("peft", "p"), ("diffusers", "d.safetensors"), ("kohya", "k.safetensors")):
        convert(saved, tmp_path / out, form, models=models, base_name="")  # type: ignore[arg-type]
        back = read_adapter(tmp_path / out, models).components["unet"][path]
        assert back.scale > 0
        torch.testing.assert_close(product(back).double(), expected, rtol=1e-6, atol=1e-6)
    theirs = PeftModel.from_pretrained(parts(sd)["unet"], tmp_path / "p" / "unet")
    found = theirs.base_model.model.get_submodule(path).get_delta_weight("default")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    apply(models["unet"], saved.components["unet"], weight=1, name="a")
    found = models["unet"].get_submodule(path).get_delta_weight("a")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_negative_alpha_of_pefts_configuration(llama: Path, tmp_path: Path) -> None:
    options = {"r": 4, "lora_alpha": -6, "alpha_pattern": {"v_proj": -2}, "init_lora_weights": False}
    config = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    theirs = get_peft_model(LlamaForCausalLM.from_pretrained(llama), config)
    theirs.save_pretrained(tmp_path)
    ours = LlamaForCausalLM.from_pretrained(llama)
    apply(ours, read_adapter(tmp_path, {"model": ours}).components["model"], weight=1, name="a")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": {"v_proj": 0}}))
    with pytest.raises(ModelError, match=r"adapter_config\.json: alpha_pattern 'v_proj' is '0'"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_convolution_with_a_core_between_is_one_without(sd: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """LyCORIS' Tucker form: 1x1 down, kernel, 1x1 up; beside one that has none."""
    models, tensors = parts(sd), {}
    path, plain = "mid_block.resnets.0.conv1", "mid_block.resnets.0.conv2"
    down, mid, up = (torch.randn(shape).to(dtype) for shape in ((4, 64, 1, 1), (4, 4, 3, 3), (64, 4, 1, 1)))
    for module, own in ((path, {"down": down, "mid": mid, "up": up}), (plain, {"down": torch.randn(4, 64, 3, 3)})):
        name = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{name}.lora_{part}.weight": tensor for part, tensor in own.items()}
        tensors[f"{name}.alpha"] = torch.tensor(3.0)
    tensors[f"{name}.lora_up.weight"] = torch.randn(64, 4, 1, 1)
    save_file(tensors, tmp_path / "a.safetensors")
    saved = read_adapter(tmp_path / "a.safetensors", models)
    expected = np.einsum("or,rskl,si->oikl", *(t.squeeze().double().numpy() for t in (up, mid, down))) * 3 / 4
    np.testing.assert_allclose(product(saved.components["unet"][path]).numpy(), expected, rtol=1e-5, atol=1e-5)
    assert convert(saved, tmp_path / "b.safetensors", "kohya", models=models, base_name="").modules == 2
    pipeline = StableDiffusionPipeline.from_pretrained(sd)
    pipeline.load_lora_weights(tmp_path / "b.safetensors")
    found = pipeline.unet.get_submodule(path).get_delta_weight("default_0")
    np.testing.assert_allclose(
        found.detach().numpy(), expected, rtol=2e-3, atol=2e-3 if dtype == torch.float16 else 1e-5
    )

    name = f"lora_unet_{path.replace('.', '_')}"
    for core in (torch.ones(4, 3, 3, 3), torch.ones(3, 4, 3, 3), torch.ones(4, 4)):
        save_file(tensors | {f"{name}.lora_mid.weight": core}, tmp_path / "c.safetensors")
        with pytest.raises(ModelError, match=f"c.safetensors: {name}.lora_mid.weight: ") as caught:
            read_adapter(tmp_path / "c.safetensors", models)
        assert "do not multiply" in str(caught.value)


SPELLINGS = {
    "LyCORIS' wrapper, as SimpleTuner has it": ("lycoris_{flat}.lora_down.weight", "lycoris_{flat}.lora_up.weight"),
    "PEFT's state dict in a diffusers file": ("unet.{path}.lora_A.default.weight", "unet.{path}.lora_B.default.weight"),
    "a PEFT model's in a diffusers file": (
        "unet.base_model.model.{path}.lora_A.weight", "unet.base_model.model.{path}.lora_B.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPELLINGS)
def test_names_of_a_unets_layers_by_other_programs(sd: Path, tmp_path: Path, kind: str) -> None:
    models, paths = parts(sd), ["mid_block.resnets.0.conv1", "mid_block.attentions.0.proj_in", "conv_in"]
    layers, tensors, expected = adaptable(models["unet"]), {}, {}
    for path in paths:
        weight = layers[path].weight
        down, up = torch.randn(2, *weight.shape[1:]), torch.randn(len(weight), 2, *[1] * (weight.dim() - 2))
        for spelling, tensor in zip(SPELLINGS[kind], (down, up), strict=True):
            tensors[spelling.format(path=path, flat=path.replace(".", "_"))] = tensor
        expected[path] = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    save_file(tensors, tmp_path / "a.safetensors")
    found = read_adapter(tmp_path / "a.safetensors", models).components["unet"]
    assert found.keys() == expected.keys()
    for path, delta in found.items():
        torch.testing.assert_close(product(delta), expected[path])


QUERY, CLIP_QUERY = "transformer_blocks.0.attn1.to_q", "text_model.encoder.layers.0.self_attn.q_proj"
MID, LEVEL = f"mid_block.attentions.0.{QUERY}", f"down_blocks.1.attentions.0.{QUERY}"
ORIGINAL = {
    f"input_blocks.4.1.{QUERY}": ("unet", LEVEL),
    f"middle_block.1.{QUERY}": ("unet", MID),
    "output_blocks.2.2.conv": ("unet", "up_blocks.0.upsamplers.0.conv"),
    "time_embed.0": ("unet", "time_embedding.linear_1"),
    "label_emb.0.2": ("unet", "add_embedding.linear_2"),
    "out.2": ("unet", "conv_out"),
}
ONETRAINER = {
    "OMI": {
        **{f"unet.{name}": place for name, place in ORIGINAL.items()},
        f"clip_l.{CLIP_QUERY}": ("text_encoder", CLIP_QUERY),
        f"clip_g.{CLIP_QUERY}": ("text_encoder_2", CLIP_QUERY),
    },
    "a UNet's original names alone": ORIGINAL,
    "raw": {
        f"lora_unet.{LEVEL}": ("unet", LEVEL),
        f"lora_te1.{CLIP_QUERY}": ("text_encoder", CLIP_QUERY),
        f"lora_te2.{CLIP_QUERY}": ("text_encoder_2", CLIP_QUERY),
    },
    "raw, of one text encoder": {f"lora_te.{CLIP_QUERY}": ("text_encoder", CLIP_QUERY)},
    "ComfyUI's of Stable Diffusion 2": {
        f"text_encoders.clip_h.transformer.{CLIP_QUERY}": ("text_encoder", CLIP_QUERY)
    },
}  # fmt: skip


@pytest.mark.parametrize("ends", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
@pytest.mark.parametrize("kind", ONETRAINER)
def test_onetrainers_names(xl: dict[str, torch.nn.Module], tmp_path: Path, kind: str, ends: tuple[str, str]) -> None:
    tensors, expected = {}, {}
    for name, (component, path) in ONETRAINER[kind].items():
        layers = adaptable(xl[component])
        path = path if path in layers else path.removeprefix("text_model.")
        weight = layers[path].weight
        down, up = torch.randn(2, *weight.shape[1:]), torch.randn(len(weight), 2, *[1] * (weight.dim() - 2))
        tensors |= {f"{name}.{ends[0]}.weight": down, f"{name}.{ends[1]}.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
        expected[component, path] = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) / 2
    save_file(tensors, tmp_path / "a.safetensors")
    found = read_adapter(tmp_path / "a.safetensors", xl).all_deltas()
    assert found.keys() == expected.keys()
    for place, delta in found.items():
        torch.testing.assert_close(product(delta), expected[place])


DTYPES = {
    1.0: (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    3.0: (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
}


@pytest.mark.parametrize(("alpha", "dtype"), [(alpha, dtype) for alpha, own in DTYPES.items() for dtype in own])
def test_an_alpha_of_any_dtype(sd: Path, tmp_path: Path, alpha: float, dtype: torch.dtype) -> None:
    """Some programs write whole numbers."""
    tensors = {"lora_unet_conv_in.lora_down.weight": torch.randn(2, 4, 3, 3).half()}
    tensors["lora_unet_conv_in.lora_up.weight"] = torch.randn(32, 2, 1, 1).half()
    tensors["lora_unet_conv_in.alpha"] = torch.tensor(alpha).to(dtype)
    save_file(tensors, tmp_path / "a.safetensors")
    assert read_adapter(tmp_path / "a.safetensors", parts(sd)).components["unet"]["conv_in"].scale == alpha / 2


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_file_in_8_bits_is_read_exactly(sd: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """As OneTrainer saves where its output is to be float8: all tensors, the alphas too."""
    down, up = torch.randn(2, 4, 3, 3).to(dtype), torch.randn(32, 2, 1, 1).to(dtype)
    down[0, 0, 0, 0] = torch.finfo(dtype).smallest_normal / 2
    tensors = {"lora_unet_conv_in.lora_down.weight": down, "lora_unet_conv_in.lora_up.weight": up}
    save_file(tensors | {"lora_unet_conv_in.alpha": torch.tensor(1.0).to(dtype)}, tmp_path / "a.safetensors")
    saved = read_adapter(tmp_path / "a.safetensors", parts(sd))
    delta = saved.components["unet"]["conv_in"]
    assert delta.scale == 0.5
    assert delta.A.dtype == torch.float16
    assert torch.equal(delta.A.double(), down.double())
    assert torch.equal(delta.B.double(), up.double())
    assert convert(saved, tmp_path / "b.safetensors", "kohya", models=parts(sd), base_name="").largest == 0
    down[1, 0, 0, 0] = torch.nan
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"lora_unet_conv_in\.lora_down\.weight: NaN or infinity"):
        read_adapter(tmp_path / "a.safetensors", parts(sd))


def test_onetrainers_dora_under_diffusers_names(sd: Path, tmp_path: Path) -> None:
    """Its backups keep its own ends of names, its diffusers files that of magnitudes of the inputs."""
    name, path = "unet.mid_block.resnets.0.conv1", "mid_block.resnets.0.conv1"
    tensors = {f"{name}.lora_down.weight": torch.randn(2, 64, 3, 3)}
    tensors[f"{name}.lora_up.weight"] = torch.randn(64, 2, 1, 1)
    magnitude = torch.rand(64, 1, 1, 1)
    save_file(tensors | {f"{name}.dora_scale": magnitude}, tmp_path / "a.safetensors")
    found = read_adapter(tmp_path / "a.safetensors", parts(sd)).components["unet"][path].magnitude
    assert found is not None
    assert torch.equal(found, magnitude.flatten())
    save_file(tensors | {f"{name}.dora_scale": torch.rand(1, 64, 1, 1)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="only DoRA on the output is supported"):
        read_adapter(tmp_path / "a.safetensors", parts(sd))


def test_the_first_upsampler_of_onetrainers_omi_files_for_stable_diffusion_1(sd: Path, tmp_path: Path) -> None:
    """Some of its versions number it as if there was an attention before it, as in SDXL."""
    for number in (1, 2):
        name = f"unet.output_blocks.1.{number}.conv"
        tensors = {f"{name}.lora_down.weight": torch.randn(2, 64, 3, 3)}
        save_file(tensors | {f"{name}.lora_up.weight": torch.randn(64, 2, 1, 1)}, tmp_path / "a.safetensors")
        found = read_adapter(tmp_path / "a.safetensors", parts(sd)).components["unet"]
        assert list(found) == ["up_blocks.0.upsamplers.0.conv"]


@pytest.mark.parametrize("alpha", [torch.tensor(True), torch.tensor(1 + 1j, dtype=torch.complex64)])
def test_an_alpha_that_is_no_number_is_refused(tmp_path: Path, alpha: torch.Tensor) -> None:
    save_file({"lora_unet_conv_in.alpha": alpha}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"conv_in\.alpha: its numbers are (BOOL|C64)"):
        open_pieces(tmp_path / "a.safetensors")


def test_a_bad_alpha_is_told_with_the_place_where_it_stands(sd: Path, tmp_path: Path) -> None:
    tensors = {"unet.conv_in.lora_A.weight": torch.randn(2, 4, 3, 3)}
    tensors["unet.conv_in.lora_B.weight"] = torch.randn(32, 2, 1, 1)
    config = {"unet.r": 2, "unet.lora_alpha": "much"}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(ModelError, match="a number other than 0") as caught:
        read_adapter(tmp_path / "a.safetensors", parts(sd))
    assert caught.value.where == f"{tmp_path / 'a.safetensors'}: lora_adapter_metadata"


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_double_blocks_0_img_attn_proj",
        "lora_unet_joint_blocks_0_x_block_attn_qkv",
        "lora_unet_transformer_blocks_0_attn_to_q",
        "lycoris_transformer_blocks_0_attn_to_q",
        "diffusion_model.blocks.0.self_attn.q",
        "transformer.transformer_blocks.0.attn.to_q",
        "lora_transformer_single_transformer_blocks_0_attn_to_q",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    ],
)
def test_an_adapter_for_a_diffusion_transformer_is_refused_as_one(tmp_path: Path, name: str) -> None:
    """Flux, SD 3, Wan, Qwen-Image: not a UNet's, whatever the format's own prefix says."""
    ends = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2)}
    save_file({f"{name}.{end}": tensor for end, tensor in ends.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="diffusion transformer") as caught:
        open_pieces(tmp_path / "a.safetensors")
    assert caught.value.where.startswith(f"{tmp_path / 'a.safetensors'}: {name}")


def test_what_llama_cpps_converter_packs_is_read(llama: Path, tmp_path: Path) -> None:
    """``--outtype`` bf16 and q8_0: blocks of 32 numbers, each an int8 times the block's float16."""
    scales = np.array([0.5, -0.25, 3.0, 1.0], np.float16)
    numbers = np.random.default_rng(0).integers(-127, 128, (4, 32)).astype(np.int8)
    packed = np.concatenate([scales.view(np.uint8).reshape(4, 2), numbers.view(np.uint8)], 1)
    up = torch.randn(32, 4).to(torch.bfloat16)
    writer, q8, bf16 = GGUFWriter(tmp_path / "a.gguf", "llama"), GGMLQuantizationType.Q8_0, GGMLQuantizationType.BF16
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    writer.add_tensor("blk.0.attn_output.weight.lora_a", packed, raw_dtype=q8)
    writer.add_tensor("blk.0.attn_output.weight.lora_b", up.view(torch.uint8).numpy(), raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    saved = read_adapter(tmp_path / "a.gguf", {"model": LlamaForCausalLM.from_pretrained(llama)})
    down = torch.from_numpy(numbers.astype(np.float64) * scales.astype(np.float64)[:, None])
    delta = saved.components["model"]["model.layers.0.self_attn.o_proj"]
    torch.testing.assert_close(product(delta).double(), 2 * up.double() @ down, rtol=1e-6, atol=1e-4)


def test_a_pickle_is_told_what_to_do_about(llama: Path, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(LlamaForCausalLM.from_pretrained(llama), config).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"only adapter_model\.bin, a pickle") as caught:
        open_pieces(tmp_path)
    assert caught.value.hint == "convert it to safetensors"


def test_adapters_that_peft_named_are_pointed_to(llama: Path, tmp_path: Path) -> None:
    """PEFT saves an adapter of another name than ``default`` into a folder of its own."""
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(llama), config, adapter_name="style")
    model.add_adapter("tone", config)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no adapter_config\.json") as caught:
        open_pieces(tmp_path)
    assert caught.value.hint == f"give {tmp_path / 'style'} or {tmp_path / 'tone'}"
    assert open_pieces(tmp_path / "tone")

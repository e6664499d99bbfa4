"""A checkpoint under the original names loads as the diffusers folder it was made from, offline."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from lorakit.errors import ModelError
from lorakit.families.place import Place
from lorakit.families.sd.base import load_parts, noise_schedule
from lorakit.families.sd.single_file import read_configs
from lorakit.storage.bases import resolve
from tests.faults.harness import process
from tests.tiny import tiny_clip_tokenizer

PLACE = Place(torch.device("cpu"), torch.float32)
LAYERS = 1
UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (32, 64),
    "layers_per_block": LAYERS,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 64,
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
WHOLE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def unet_name(name: str, attention: list[bool], layers: int = LAYERS) -> str:
    """A diffusers UNet path as the original code names it; ``attention`` by level on the way down."""
    for new, old in WHOLE.items():
        if name.startswith(f"{new}."):
            return name.replace(new, old, 1)
    if m := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        place, rest = f"middle_block.{2 * int(m[2]) if m[1] == 'resnets' else 1}", m[3]
    else:
        m = re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name)
        assert m is not None
        level, kind, number, rest = int(m[2]), m[3], int(m[4]), m[5]
        if kind == "downsamplers":
            return f"input_blocks.{(layers + 1) * (level + 1)}.0.{rest.replace('conv', 'op')}"
        if kind == "upsamplers":
            return f"output_blocks.{(layers + 1) * level + layers}.{1 + attention[-1 - level]}.{rest}"
        first = 1 if m[1] == "down" else 0
        side = "input" if m[1] == "down" else "output"
        place = f"{side}_blocks.{(layers + 1) * level + number + first}.{int(kind == 'attentions')}"
    head, _, tail = rest.partition(".")
    return f"{place}.{RESNET[head]}.{tail}" if head in RESNET else f"{place}.{rest}"


def vae_name(name: str, levels: int) -> str:
    for new, old in (
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
        ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"),
        ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
        ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
        ("mid_block.attentions.0.to_", "mid.attn_1."),
    ):
        name = name.replace(new, old)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
    return re.sub(r"down_blocks\.(\d)", r"down.\1", name).replace("resnets", "block")


def vae_tensors(vae: nn.Module) -> dict[str, Tensor]:
    """The VAE as a single file has it: attention's matrices are convolutions."""
    found = {}
    for name, tensor in vae.state_dict().items():
        square = re.search(r"mid_block\.attentions\.0\.to_.*weight", name) is not None
        levels = len(vae.config.block_out_channels)  # type: ignore[union-attr,arg-type]
        found[f"first_stage_model.{vae_name(name, levels)}"] = tensor[:, :, None, None] if square else tensor
    return found


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET, attention_head_dim=8)
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
    )
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = CLIPTextConfig(vocab_size=len(tiny_clip_tokenizer()), **shape)
    return {"unet": unet.eval(), "vae": vae.eval(), "text_encoder": CLIPTextModel(config).eval()}


def write(folder: Path, models: dict[str, Any], changes: dict[str, Tensor] | None = None) -> Path:
    attention = [True, False]
    tensors = {f"model.diffusion_model.{unet_name(k, attention)}": v for k, v in models["unet"].state_dict().items()}
    tensors |= vae_tensors(models["vae"])
    prefix = "cond_stage_model.transformer.text_model."
    for k, v in models["text_encoder"].state_dict().items():
        tensors[prefix + k.removeprefix("text_model.")] = v
    tensors[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    tensors["alphas_cumprod"] = torch.rand(1000)
    path = folder / "tiny.safetensors"
    save_file({k: v.contiguous() for k, v in (tensors | (changes or {})).items()}, path)
    tiny_clip_tokenizer().save_pretrained(folder / "tokenizer")
    return path


def test_it_computes_what_the_models_compute(models: dict[str, Any], tmp_path: Path) -> None:
    parts = load_parts(resolve(str(write(tmp_path, models))), PLACE)
    generator = torch.Generator().manual_seed(0)
    noisy, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 64, generator=generator)
    pixels, ids = torch.rand(1, 3, 16, 16, generator=generator) * 2 - 1, torch.tensor([[0, 5, 9, 1]])
    with torch.no_grad():
        for ours, theirs, inputs, rounding in (
            (parts.unet, models["unet"], (noisy, torch.tensor([3, 900]), states), 5e-6),  # our own GEGLU
            (parts.vae.encoder, models["vae"].encoder, (pixels,), 0),
            (parts.vae.decoder, models["vae"].decoder, (noisy,), 0),
            (parts.adaptable["text_encoder"], models["text_encoder"], (ids,), 0),
        ):
            a, b = ours(*inputs), theirs(*inputs)
            a, b = (x if isinstance(x, Tensor) else x[0] for x in (a, b))
            torch.testing.assert_close(a, b, rtol=0, atol=rounding)
    assert parts.factor == 2
    alphas, kind = noise_schedule(parts.schedule, "tiny")
    assert kind == "epsilon"
    assert float(1 - alphas[0]) == pytest.approx(0.00085, rel=1e-4)


def test_no_library_speaks_while_one_is_drawn_from(models: dict[str, Any], tmp_path: Path) -> None:
    path, small = write(tmp_path, models), ("--width", 32, "--height", 32, "--steps", 2)
    told = process("generate", "--base", path, "--prompt", "a cat", "--out", tmp_path / "out", *small)
    assert (told.code, told.err) == (0, "")


def test_prediction_types(models: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, models)
    assert read_configs(path).schedule["prediction_type"] == "epsilon"
    (tmp_path / "tiny.yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    assert read_configs(path).schedule["prediction_type"] == "v_prediction"
    save_file(load_file(path), path, metadata={"modelspec.prediction_type": "epsilon"})
    assert read_configs(path).schedule["prediction_type"] == "v_prediction"
    assert "says that it predicts epsilon, but v_prediction is taken" in caplog.text
    (tmp_path / "tiny.yaml").unlink()
    assert read_configs(path).schedule["prediction_type"] == "epsilon"
    save_file(load_file(path), path, metadata={"modelspec.prediction_type": "v"})
    assert read_configs(path).schedule["prediction_type"] == "v_prediction"


def test_no_vocabulary_a_missing_tensor_and_another_shape(
    models: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, models)
    (tmp_path / "tokenizer").rename(tmp_path / "elsewhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="CLIP's vocabulary is not on this machine"):
        load_parts(resolve(str(path)), PLACE)
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(ModelError, match="CLIP's vocabulary is not on this machine"):
        load_parts(resolve(str(path)), PLACE)
    (tmp_path / "tokenizer").rmdir()
    (tmp_path / "elsewhere").rename(tmp_path / "tokenizer")
    tensors = load_file(path)
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    for changed in ({k: v for k, v in tensors.items() if k != name}, tensors | {name: tensors[name][:8].contiguous()}):
        save_file(changed, path)
        with pytest.raises(ModelError, match=r"mid_block\.resnets\.0\.conv1\.weight"):
            load_parts(resolve(str(path)), PLACE)

"""Single-file checkpoints of SD 1.x and 2.x under their original names: configs from the tensors' shapes, no network.

The names are mapped to diffusers' by diffusers. What such a file does not hold is the tokenizer: CLIP's vocabulary is
taken from a folder ``tokenizer`` beside the file, or from the hub's cache on this machine.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lorakit.errors import ModelError
from lorakit.storage.headers import read_header

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
PREFIXES = {"unet": UNET, "vae": VAE, "text_encoder": TEXT}
OPEN_CLIP = f"{TEXT}model.ln_final.weight"
"""A tensor that OpenCLIP's text encoder, which SD 2.x has, alone has."""
CLIP = "openai/clip-vit-large-patch14"
# diffusers has no types
_unet: Any = UNet2DConditionModel
_vae: Any = AutoencoderKL
_rename_unet: Any = convert_ldm_unet_checkpoint
_rename_vae: Any = convert_ldm_vae_checkpoint
_rename_open_clip: Any = convert_open_clip_checkpoint

Shapes = Mapping[str, tuple[int, ...]]


class SingleFile(NamedTuple):
    tokenizer: CLIPTokenizer
    text_encoder: nn.Module
    unet: nn.Module
    vae: Any
    schedule: dict[str, Any]


class Configs(NamedTuple):
    """What the shapes tell: keyword arguments of the diffusers and transformers configs, and the scheduler's table."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    schedule: dict[str, Any]


def read_configs(path: Path) -> Configs:
    """The configs of a checked single file, from its header alone. Raises: ModelError for a layout it cannot tell."""
    header = read_header(path)
    shapes = {name: tuple(info.shape) for name, info in header.tensors.items()}
    second = OPEN_CLIP in shapes
    kind = _prediction_type(path, header.metadata, second)
    try:
        return configs_of_shapes(shapes, kind)
    except (KeyError, IndexError, ValueError) as error:
        raise ModelError(f"not laid out like SD 1.x or 2.x: no {error}", where=str(path)) from error


def configs_of_shapes(shapes: Shapes, kind: str) -> Configs:
    """The configs that the tensors' shapes tell; ``kind`` is what the UNet predicts. KeyError and the like for a layout
    that is not SD 1.x or 2.x."""
    second = OPEN_CLIP in shapes
    return Configs(_unet_config(shapes, kind), _vae_config(shapes), _text_config(shapes, second), _schedule(kind))


def load_single_file(path: Path, dtype: torch.dtype, tokenizer: CLIPTokenizer | None = None) -> SingleFile:
    """Load all parts, UNet and text encoder in ``dtype``, the VAE in float32; CLIP's tokenizer where none is given.

    Raises: ModelError when a tensor is missing, left over or misshapen, or CLIP's vocabulary is not on this machine.
    """
    configs = read_configs(path)
    tokenizer = tokenizer or load_tokenizer(path, configs.text_encoder["vocab_size"])
    unet, vae = _unet(**configs.unet), _vae(**configs.vae)
    text_encoder: Any = CLIPTextModel(CLIPTextConfig(**configs.text_encoder))
    for component, module in (("unet", unet), ("vae", vae), ("text_encoder", text_encoder)):
        _fill(module, rename(component, _tensors(path, PREFIXES[component]), module), path)
    return SingleFile(tokenizer, text_encoder.to(dtype), unet.to(dtype), vae.float(), configs.schedule)


def rename(component: str, tensors: Mapping[str, Tensor], module: Any) -> dict[str, Tensor]:
    """A component's tensors under diffusers' names, given those of the file that start with its prefix."""
    if component == "unet":
        return dict(_rename_unet(tensors, module.config))
    if component == "vae":
        return dict(_rename_vae(tensors, module.config))
    if OPEN_CLIP in tensors:
        unused = f"{TEXT}model.transformer.resblocks.{module.config.num_hidden_layers}."
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(unused)}
        tensors = _rename_open_clip(module, tensors)
    else:
        tensors = {name.removeprefix(f"{TEXT}transformer."): tensor for name, tensor in tensors.items()}
    bare = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    derived = ("embeddings.position_ids", "text_projection.weight", "logit_scale")
    return {name: tensor for name, tensor in bare.items() if name not in derived}


def _tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(dict(tensors))
    except RuntimeError as error:
        told = str(error).splitlines()
        raise ModelError(f"{told[0]} {told[1].strip() if told[1:] else ''}".strip(), where=str(path)) from error


def _unet_config(shapes: Shapes, kind: str) -> dict[str, Any]:
    def at(name: str) -> tuple[int, ...]:
        return shapes[f"{UNET}{name}"]

    halvings = sorted(int(m[1]) for n in shapes if (m := re.fullmatch(rf"{UNET}input_blocks\.(\d+)\.0\.op\.weight", n)))
    layers = halvings[0] - 1
    firsts = [(layers + 1) * level + 1 for level in range(len(halvings) + 1)]
    channels = [at(f"input_blocks.{first}.0.out_layers.3.weight")[0] for first in firsts]
    attention = [f"{UNET}input_blocks.{first}.1.proj_in.weight" in shapes for first in firsts]
    projection = at(f"input_blocks.{firsts[attention.index(True)]}.1.proj_in.weight")
    context = f"input_blocks.{firsts[attention.index(True)]}.1.transformer_blocks.0.attn2.to_k.weight"
    linear = len(projection) == 2
    return {
        "sample_size": 96 if kind == "v_prediction" else 64,
        "in_channels": at("input_blocks.0.0.weight")[1],
        "out_channels": at("out.2.weight")[0],
        "layers_per_block": layers,
        "block_out_channels": tuple(channels),
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        "cross_attention_dim": at(context)[1],
        "attention_head_dim": tuple(c // 64 for c in channels) if linear else 8,
        "use_linear_projection": linear,
    }


def _vae_config(shapes: Shapes) -> dict[str, Any]:
    names = [m for n in shapes if (m := re.match(rf"{VAE}encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight", n))]
    levels = 1 + max(int(m[1]) for m in names)
    return {
        "block_out_channels": tuple(shapes[f"{VAE}encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": 1 + max(int(m[2]) for m in names),
        "latent_channels": shapes[f"{VAE}quant_conv.weight"][0] // 2,
        "mid_block_add_attention": f"{VAE}encoder.mid.attn_1.q.weight" in shapes,
        "sample_size": 512,
        "scaling_factor": 0.18215,
    }


def _text_config(shapes: Shapes, second: bool) -> dict[str, Any]:
    def find(pattern: str) -> list[re.Match[str]]:
        return [m for name in shapes if (m := re.fullmatch(TEXT + pattern, name))]

    if second:  # OpenCLIP's ViT-H; Stable Diffusion 2 takes the states before the last layer
        layers = {int(m[1]) for m in find(r"model\.transformer\.resblocks\.(\d+)\.ln_1\.weight")}
        vocabulary, width = shapes[f"{TEXT}model.token_embedding.weight"]
        inner = shapes[f"{TEXT}model.transformer.resblocks.0.mlp.c_fc.weight"][0]
        positions = shapes[f"{TEXT}model.positional_embedding"][0]
        count, activation, pad = max(layers), "gelu", 1
    else:
        prefix = r"transformer\.(?:text_model\.)?"
        layers = {int(m[1]) for m in find(prefix + r"encoder\.layers\.(\d+)\.layer_norm1\.weight")}
        vocabulary, width = shapes[find(prefix + r"embeddings\.token_embedding\.weight")[0][0]]
        inner = shapes[find(prefix + r"encoder\.layers\.0\.mlp\.fc1\.weight")[0][0]][0]
        positions = shapes[find(prefix + r"embeddings\.position_embedding\.weight")[0][0]][0]
        count, activation, pad = 1 + max(layers), "quick_gelu", 1
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": count,
        "num_attention_heads": width // 64,
        "max_position_embeddings": positions,
        "hidden_act": activation,
        "projection_dim": width,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": pad,
    }


def _prediction_type(path: Path, metadata: Mapping[str, str], second: bool) -> str:
    """From the file's metadata or a .yaml beside it; SD 1.x without either predicts epsilon."""
    if "modelspec.prediction_type" in metadata:
        return {"v": "v_prediction"}.get(metadata["modelspec.prediction_type"], metadata["modelspec.prediction_type"])
    settings = path.with_suffix(".yaml")
    if settings.is_file():
        return "v_prediction" if re.search(r"parameterization:\s*[\"']?v\b", settings.read_text()) else "epsilon"
    if second:
        reason = "an SD 2.x file does not tell whether it predicts epsilon or v"
        hint = f"put its {settings.name} beside it, or convert it to a diffusers folder"
        raise ModelError(reason, where=str(path), hint=hint)
    return "epsilon"


def _schedule(kind: str) -> dict[str, Any]:
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": kind,
    }


def load_tokenizer(path: Path, size: int) -> CLIPTokenizer:
    """CLIP's, with ``size`` tokens: counted, as transformers makes an empty one where files are missing.

    Raises: ModelError when its files are neither beside the checkpoint nor in the hub's cache.
    """
    beside = path.parent / "tokenizer"
    source = str(beside) if beside.is_dir() else CLIP
    found: CLIPTokenizer | None = None
    options: dict[str, Any] = {"pad_token": "!"} if OPEN_CLIP in read_header(path).tensors else {}
    with suppress(OSError, ValueError):
        found = CLIPTokenizer.from_pretrained(source, local_files_only=True, **options)
    if found is None or len(found) < size:
        reason = "a single file holds no tokenizer, and CLIP's vocabulary is not on this machine"
        files = "vocab.json merges.txt tokenizer_config.json special_tokens_map.json"
        raise ModelError(reason, where=str(path), hint=f"hf download {CLIP} {files}, or put these in {beside}")
    if len(found) > size:
        raise ModelError(f"{source} has {len(found)} tokens, the text encoder {size}", where=str(path))
    return found

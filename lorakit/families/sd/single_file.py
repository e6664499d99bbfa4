"""Single-file checkpoints of Stable Diffusion under their original names: configs from the tensors' shapes, no network.

The names are mapped to diffusers' by diffusers. What such a file does not hold is the tokenizer: CLIP's vocabulary is
taken from a folder ``tokenizer`` beside the file, or from the hub's cache on this machine.
"""

import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lorakit.errors import ModelError
from lorakit.families.sd.encoders import Shapes, bare_names
from lorakit.families.sd.kinds import UNET, VAE, Kind, kind_of
from lorakit.storage.checks import read_text
from lorakit.storage.headers import read_header

log = logging.getLogger("lorakit")
CLIP = "openai/clip-vit-large-patch14"
# diffusers has no types
_unet: Any = UNet2DConditionModel
_vae: Any = AutoencoderKL
_rename_unet: Any = convert_ldm_unet_checkpoint
_rename_vae: Any = convert_ldm_vae_checkpoint


class SingleFile(NamedTuple):
    encoders: dict[str, nn.Module]
    """By component."""
    unet: nn.Module
    vae: Any
    schedule: dict[str, Any]


class Configs(NamedTuple):
    """What the shapes tell: keyword arguments of the diffusers and transformers configs, and the scheduler's table."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    texts: dict[str, dict[str, Any]]
    """By component."""
    schedule: dict[str, Any]


def read_configs(path: Path) -> Configs:
    """The configs of a checked single file, from its header alone. Raises: ModelError for a layout it cannot tell."""
    header, kind = read_header(path), kind_of(path)
    shapes = {name: tuple(info.shape) for name, info in header.tensors.items()}
    prediction = _prediction_type(path, header.metadata, kind, shapes)
    if prediction not in kind.sides:
        raise ModelError(f"the base predicts {prediction!r}, not epsilon or v_prediction", where=str(path))
    try:
        return configs_of_shapes(kind, shapes, prediction)
    except (KeyError, IndexError, ValueError) as error:
        raise ModelError(f"not laid out like SD 1.x, 2.x or XL: no {error}", where=str(path)) from error


def configs_of_shapes(kind: Kind, shapes: Shapes, prediction: str) -> Configs:
    """The configs that the tensors' shapes tell; ``prediction`` is what the UNet predicts. KeyError and the like for a
    layout that is not the kind's."""
    texts = {
        component: encoder.config({name: shape for name, shape in shapes.items() if name.startswith(encoder.prefix)})
        for component, encoder in kind.encoders.items()
    }
    schedule = {**kind.schedule, "prediction_type": prediction}
    if kind.told and "ztsnr" in shapes:
        schedule["rescale_betas_zero_snr"] = True
    unet = _unet_config(shapes) | {"sample_size": kind.sides[prediction]} | _added(shapes, texts)
    vae = _vae_config(shapes) | {"scaling_factor": kind.scaling_factor}
    return Configs(unet, vae, texts, schedule)


def load_single_file(path: Path, dtype: torch.dtype) -> SingleFile:
    """Load all parts, UNet and text encoders in ``dtype``, the VAE in float32.

    Raises: ModelError when a tensor is missing, left over or misshapen.
    """
    kind, configs = kind_of(path), read_configs(path)
    encoders = make_encoders(configs.texts)
    modules = {"unet": _unet(**configs.unet), "vae": _vae(**configs.vae), **encoders}
    for component, module in modules.items():
        _fill(module, rename(kind, component, _tensors(path, kind.prefixes[component]), module), path)
    texts = {name: encoder.to(dtype) for name, encoder in encoders.items()}
    return SingleFile(texts, modules["unet"].to(dtype), modules["vae"].float(), configs.schedule)


def make_encoders(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, nn.Module]:
    """Text encoders without weights, by component; SDXL's second has a projection."""
    kinds: dict[str, Any] = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    return {name: kinds[name](CLIPTextConfig.from_dict(dict(config))) for name, config in configs.items()}


def rename(kind: Kind, component: str, tensors: Mapping[str, Tensor], module: Any) -> dict[str, Tensor]:
    """A component's tensors under the module's own names, given those of the file that start with its prefix."""
    if component == "unet":
        return dict(_rename_unet(tensors, module.config))
    if component == "vae":
        return dict(_rename_vae(tensors, module.config))
    names = bare_names(module)
    return {names.get(name, name): t for name, t in kind.encoders[component].rename(tensors, module).items()}


def _tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(dict(tensors))
    except RuntimeError as error:
        told = str(error).splitlines()
        raise ModelError(f"{told[0]} {told[1].strip() if told[1:] else ''}".strip(), where=str(path)) from error


def _unet_config(shapes: Shapes) -> dict[str, Any]:
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
    block = re.compile(rf"{UNET}input_blocks\.(\d+)\.1\.transformer_blocks\.(\d+)\.norm1\.weight")
    blocks = [(int(m[1]), int(m[2])) for name in shapes if (m := block.fullmatch(name))]
    depths = [1 + max((depth for place, depth in blocks if place == first), default=0) for first in firsts]
    return {
        "in_channels": at("input_blocks.0.0.weight")[1],
        "out_channels": at("out.2.weight")[0],
        "layers_per_block": layers,
        "block_out_channels": tuple(channels),
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        "cross_attention_dim": at(context)[1],
        "transformer_layers_per_block": tuple(depths),
        "attention_head_dim": tuple(max(1, c // 64) for c in channels) if linear else 8,
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
    }


def _added(shapes: Shapes, texts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """SDXL's UNet is told the pooled text and six sizes, each as a vector."""
    inputs = shapes.get(f"{UNET}label_emb.0.0.weight", (0, 0))[1]
    if not inputs:
        return {}
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (inputs - texts["text_encoder_2"]["projection_dim"]) // 6,
        "projection_class_embeddings_input_dim": inputs,
    }


def _prediction_type(path: Path, metadata: Mapping[str, str], kind: Kind, shapes: Shapes) -> str:
    """From a .yaml beside the file, a tensor that says it, or the metadata; else what the kind does for the most.

    The metadata comes after them: kohya's merges write "epsilon" whatever the base predicts.
    """
    told = metadata.get("modelspec.prediction_type")
    told = "v_prediction" if told == "v" else told
    settings, found = path.with_suffix(".yaml"), None
    if settings.is_file():
        found = "v_prediction" if re.search(r"parameterization:\s*[\"']?v\b", read_text(settings)) else "epsilon"
    elif kind.told and "v_pred" in shapes:
        found = "v_prediction"
    if found is not None and told not in (None, found):
        log.warning("%s: its metadata says that it predicts %s, but %s is taken", path, told, found)
    if found or told:
        return str(found or told)
    if kind.guess is None:
        reason = "an SD 2.x file does not tell whether it predicts epsilon or v"
        hint = f"put its {settings.name} beside it, or convert it to a diffusers folder"
        raise ModelError(reason, where=str(path), hint=hint)
    return kind.guess


def load_tokenizers(path: Path) -> dict[str, CLIPTokenizer]:
    """CLIP's for each text encoder, by component (``tokenizer``, ``tokenizer_2``).

    Raises: ModelError when its files are neither beside the checkpoint nor in the hub's cache.
    """
    texts = read_configs(path).texts
    return {
        name.replace("text_encoder", "tokenizer"): _load_tokenizer(path, texts[name]["vocab_size"], encoder.tokenizer)
        for name, encoder in kind_of(path).encoders.items()
    }


def _load_tokenizer(path: Path, size: int, options: Mapping[str, Any]) -> CLIPTokenizer:
    """With ``size`` tokens: counted, as transformers makes an empty one where files are missing."""
    beside = path.parent / "tokenizer"
    source = str(beside) if beside.is_dir() else CLIP
    found: CLIPTokenizer | None = None
    with suppress(OSError, ValueError):
        found = CLIPTokenizer.from_pretrained(source, local_files_only=True, **options)
    if found is None or len(found) < size:
        reason = "a single file holds no tokenizer, and CLIP's vocabulary is not on this machine"
        files = "vocab.json merges.txt tokenizer_config.json special_tokens_map.json"
        raise ModelError(reason, where=str(path), hint=f"hf download {CLIP} {files}, or put these in {beside}")
    if len(found) > size:
        raise ModelError(f"{source} has {len(found)} tokens, the text encoder {size}", where=str(path))
    return found

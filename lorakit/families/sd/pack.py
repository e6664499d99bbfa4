"""A diffusers folder of SD 1.x under the original names of a single file.

The names are written down here and proved each time: diffusers' own conversion must lead back to where each came from.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.merge_base import Packed
from lorakit.adapters.sgm import original_paths
from lorakit.errors import ModelError
from lorakit.families.sd.plan import skeleton
from lorakit.families.sd.single_file import PREFIXES, TEXT, UNET, VAE, configs_of_shapes, rename
from lorakit.storage.bases import BaseLocation

_VAE_PARTS = (
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
    ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
    ("mid_block.attentions.0.to_", "mid.attn_1."),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("resnets", "block"),
    ("down_blocks", "down"),
)
_HINT = "name a folder for OUT"


def packed_names(location: BaseLocation) -> tuple[dict[str, Packed], dict[str, str]]:
    """Every tensor of the single file, by original name, and the file's metadata.

    Raises ModelError for a base that a single file of SD 1.x cannot say: another layout, or sizes that its readers
    would guess wrongly.
    """
    bones = skeleton(location, torch.float32)
    if set(bones.adaptable) != {"unet", "text_encoder"} or _config(bones.unet)["use_linear_projection"]:
        raise ModelError("only SD 1.x folders become single files", where=location.name, hint=_HINT)
    models = {**bones.adaptable, "vae": bones.vae}
    packed = _unet(models["unet"])
    for name, tensor in bones.vae.state_dict().items():
        packed[f"{VAE}{_vae_name(name, bones.vae)}"] = _vae(name, tensor)
    for name, tensor in models["text_encoder"].state_dict().items():
        key = f"{TEXT}transformer.text_model.{name.removeprefix('text_model.')}"
        packed[key] = Packed("text_encoder", name, tuple(tensor.shape))
    _prove(packed, models, location)
    kind = str(bones.schedule["prediction_type"])
    _check_configs(packed, models, kind, location)
    spelt = {"modelspec.architecture": "stable-diffusion-v1", "modelspec.prediction_type": kind.partition("_")[0]}
    return packed, {"format": "pt", "modelspec.sai_model_spec": "1.0.1", **spelt}


def _config(model: Any) -> Mapping[str, Any]:
    config: Mapping[str, Any] = model.config
    return config


def _unet(model: nn.Module) -> dict[str, Packed]:
    state = model.state_dict()
    paths = original_paths(list(dict.fromkeys(name.rpartition(".")[0] for name in state)))
    return {
        f"{UNET}{paths[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": Packed("unet", name, tuple(tensor.shape))
        for name, tensor in state.items()
    }


def _vae_name(name: str, vae: nn.Module) -> str:
    levels = len(_config(vae)["block_out_channels"])
    for new, old in _VAE_PARTS:
        name = name.replace(new, old)
    return re.sub(r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", name)


def _vae(name: str, tensor: Tensor) -> Packed:
    """Attention's matrices are convolutions there."""
    square = re.search(r"mid_block\.attentions\.0\.to_.*weight", name) is not None
    return Packed("vae", name, (*tensor.shape, 1, 1) if square else tuple(tensor.shape))


def _prove(packed: Mapping[str, Packed], models: Mapping[str, nn.Module], location: BaseLocation) -> None:
    for component, model in models.items():
        own = [key for key in packed if key.startswith(PREFIXES[component])]
        marks = {key: torch.full((1,) * len(packed[key].shape), number) for number, key in enumerate(own)}
        found = {name: packed[own[int(mark)]] for name, mark in rename(component, marks, model).items()}
        expected = {name.removeprefix("text_model.") for name in model.state_dict()}
        wrong = [name for name, part in found.items() if part.name.removeprefix("text_model.") != name]
        for name in sorted(wrong) or sorted(found.keys() ^ expected):
            raise ModelError(f"{component}.{name} has no original name", where=location.name, hint=_HINT)


def _check_configs(
    packed: Mapping[str, Packed], models: Mapping[str, nn.Module], kind: str, location: BaseLocation
) -> None:
    """What readers of a single file take for granted must be what the folder's configs say."""
    configs = configs_of_shapes({key: part.shape for key, part in packed.items()}, kind)
    taken = {"unet": configs.unet, "vae": configs.vae, "text_encoder": configs.text_encoder}
    ids = {"bos_token_id", "eos_token_id", "pad_token_id", "projection_dim", "sample_size"}
    for component, values in taken.items():
        config = models[component].config
        for key, value in values.items():
            own = config[key] if isinstance(config, Mapping) else getattr(config, key)
            same = tuple(own) == tuple(value) if isinstance(own, list | tuple) else own == value
            if key not in ids and not same:
                reason = f"{component}'s {key} is {own}, a single file's readers take it to be {value}"
                raise ModelError(reason, where=location.name, hint=_HINT)

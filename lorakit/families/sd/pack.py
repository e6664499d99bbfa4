"""A diffusers folder of Stable Diffusion under the original names of a single file.

The names are written down here and proved each time: diffusers' own conversion must lead back to where each came from.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.merging.base import Packed
from lorakit.adapters.sgm import original_paths
from lorakit.errors import ModelError
from lorakit.families.sd.base import noise_schedule
from lorakit.families.sd.kinds import KINDS, UNET, VAE, Kind
from lorakit.families.sd.original import original_names
from lorakit.families.sd.single_file import Configs, configs_of_shapes
from lorakit.families.sd.skeleton import Skeleton, skeleton
from lorakit.storage.bases import BaseLocation
from lorakit.storage.checks import read_json

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

    Raises ModelError for a base that no single file can say: another layout, or sizes and a schedule that its readers
    would guess wrongly.
    """
    bones = skeleton(location, torch.float32)
    kind = _kind(bones, location)
    models = {**bones.adaptable, "vae": bones.vae}
    packed = _unet(models["unet"])
    for name, tensor in bones.vae.state_dict().items():
        packed[f"{VAE}{_vae_name(name, bones.vae)}"] = _vae(name, tensor)
    for component, encoder in kind.encoders.items():
        packed |= encoder.names(component, models[component])
    _prove(kind, packed, models, location)
    predicted = noise_schedule(bones.schedule, location.name)[1]
    if kind.told:
        said = {"v_pred": predicted == "v_prediction", "ztsnr": bones.schedule.get("rescale_betas_zero_snr")}
        packed |= {name: Packed((), (0,)) for name, so in said.items() if so}
    shapes = {key: part.shape for key, part in packed.items()}
    _check_configs(configs_of_shapes(kind, shapes, predicted), models, location)
    _check_rest(kind, configs_of_shapes(kind, shapes, predicted), bones, location)
    spelt = {
        "modelspec.architecture": kind.architecture[predicted],
        "modelspec.prediction_type": predicted.partition("_")[0],
    }
    return packed, {"format": "pt", "modelspec.sai_model_spec": "1.0.1", **spelt}


def _kind(bones: Skeleton, location: BaseLocation) -> Kind:
    linear = _config(bones.unet)["use_linear_projection"]
    for kind in KINDS:
        if kind.encoders.keys() == bones.conditioning.encoders.keys() and kind.linear == linear:
            return kind
    raise ModelError("only SD 1.x, 2.x and XL become single files", where=location.name, hint=_HINT)


def _config(model: Any) -> Mapping[str, Any]:
    config: Mapping[str, Any] = model.config
    return config


def _unet(model: nn.Module) -> dict[str, Packed]:
    state = model.state_dict()
    paths = original_paths(list(dict.fromkeys(name.rpartition(".")[0] for name in state)))
    return {
        f"{UNET}{paths[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": Packed(
            (("unet", name),), tuple(tensor.shape)
        )
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
    return Packed((("vae", name),), (*tensor.shape, 1, 1) if square else tuple(tensor.shape))


def _prove(kind: Kind, packed: Mapping[str, Packed], models: Mapping[str, nn.Module], location: BaseLocation) -> None:
    found = original_names(kind, {key: part.shape for key, part in packed.items()}, models, location.name)
    spare = {key for key in packed.keys() - found.keys() if any(found[k].parts == packed[key].parts for k in found)}
    wrong = [key for key in packed if key not in spare and found.get(key) != packed[key]]
    lost = {(c, name) for c, model in models.items() for name in model.state_dict()}
    lost -= {part for one in found.values() for part in one.parts}
    for what in (*wrong, *(f"{component}.{name}" for component, name in sorted(lost))):
        raise ModelError(f"{what} has no original name", where=location.name, hint=_HINT)


def _check_configs(taken: Configs, models: Mapping[str, nn.Module], location: BaseLocation) -> None:
    """What readers of a single file take for granted must be what the folder's configs say."""
    ids = {"bos_token_id", "eos_token_id", "pad_token_id", "sample_size"}
    for component, values in {"unet": taken.unet, "vae": taken.vae, **taken.texts}.items():
        config = models[component].config
        unused = ids if component == "text_encoder_2" else ids | {"projection_dim"}
        for key, value in values.items():
            own = config[key] if isinstance(config, Mapping) else getattr(config, key)
            if key not in unused and _spread(own, value) != _spread(value, value):
                reason = f"{component}'s {key} is {own}, a single file's readers take it to be {value}"
                raise ModelError(reason, where=location.name, hint=_HINT)


def _spread(own: Any, like: Any) -> Any:
    """A number that stands for all levels once for each, where ``like`` has one for each."""
    if not isinstance(like, tuple):
        return own
    return tuple(own) if isinstance(own, list | tuple) else (own,) * len(like)


def _check_rest(kind: Kind, taken: Configs, bones: Skeleton, location: BaseLocation) -> None:
    """The noise schedule, and how SDXL knows its pooled text and an empty caption."""
    found, expected = (noise_schedule(one, location.name)[0] for one in (bones.schedule, taken.schedule))
    if not torch.equal(found, expected):
        raise ModelError("its noise schedule is not a single file's", where=location.name, hint=_HINT)
    if (second := bones.conditioning.encoders.get("text_encoder_2")) is not None:
        config: Any = second.config
        if config.eos_token_id not in (2, config.vocab_size - 1):
            reason = f"text_encoder_2 reads token {config.eos_token_id}, a single file's readers the largest one"
            raise ModelError(reason, where=location.name, hint=_HINT)
    key = "force_zeros_for_empty_prompt"
    zeros = read_json(location.path / "model_index.json").get(key, True)
    if zeros != kind.options.get(key, zeros):
        reason = f"{key} is {zeros}, a single file's readers take it to be {kind.options[key]}"
        raise ModelError(reason, where=location.name, hint=_HINT)

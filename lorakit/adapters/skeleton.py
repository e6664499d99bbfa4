"""A base's components without their weights, to hold an adapter's names and shapes against."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lorakit.storage.bases import BaseLocation
from lorakit.storage.checks import read_json, weight_stems
from lorakit.storage.foreign import model_errors


def skeleton(base: BaseLocation, place: AbstractContextManager[object] | None = None) -> dict[str, nn.Module]:
    """``model``, or ``unet``, ``text_encoder`` and, of SDXL, ``text_encoder_2``, of a checked folder, made in
    ``place``: on the meta device where none is given."""
    place = torch.device("meta") if place is None else place
    with model_errors(base.name, "the config does not make a model"):
        make = _language_model if base.layout == "transformers" else _stable_diffusion
        return make(base.path, place)


def _language_model(folder: Path, place: AbstractContextManager[object]) -> dict[str, nn.Module]:
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    causal: Any = AutoModelForCausalLM
    with place:
        return {"model": causal.from_config(config)}


def _stable_diffusion(folder: Path, place: AbstractContextManager[object]) -> dict[str, nn.Module]:
    from diffusers import UNet2DConditionModel  # takes seconds to import, for nothing with a language model
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    unet: Any = UNet2DConditionModel
    classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    there = weight_stems(folder)
    with place:
        return {
            "unet": unet.from_config(unet.load_config(folder / "unet", local_files_only=True)),
            **{
                name: kind(CLIPTextConfig.from_dict(read_json(folder / name / "config.json")))
                for name, kind in classes.items()
                if name in there
            },
        }

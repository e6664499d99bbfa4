"""The published Stable Diffusions by their shapes, so that an adapter for one can be read without having the base."""

from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.formats import bare, long
from lorakit.adapters.write import Version

_SECOND_CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
_BIG_CLIP = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
_CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
UNETS: Mapping[Version, dict[str, Any]] = {
    "sd_v1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd_v2": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl_base_v1-0": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""Keyword arguments of diffusers' UNet2DConditionModel, beside its defaults."""

_SECOND = ("lora_te2_", "lora_te2.", "clip_g.", "text_encoders.clip_g.", "text_encoder_2.")
"""How names of SDXL's second text encoder begin."""
SPELLED: Mapping[Version, str] = {
    "sd_v1": "Stable Diffusion 1",
    "sd_v2": "Stable Diffusion 2",
    "sdxl_base_v1-0": "Stable Diffusion XL",
}


@lru_cache(maxsize=1)
def known_models(version: Version) -> dict[str, nn.Module]:
    """The components of a published Stable Diffusion that can have LoRA, on the meta device."""
    from diffusers import UNet2DConditionModel  # takes seconds to import, for nothing with a language model
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    # transformers checks keywords against types that these tables do not have
    unet: Any = UNet2DConditionModel
    config: Any = CLIPTextConfig
    with torch.device("meta"):
        models: dict[str, nn.Module] = {"unet": unet(**UNETS[version])}
        models["text_encoder"] = CLIPTextModel(config(**(_SECOND_CLIP if version == "sd_v2" else _CLIP)))
        if version == "sdxl_base_v1-0":
            models["text_encoder_2"] = CLIPTextModelWithProjection(config(**_BIG_CLIP, projection_dim=1280))
    return models


@cache
def encoder_path(component: str, path: str) -> str:
    """A text encoder's layer as the transformers that is installed has it: with or without ``text_model.`` in front."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind: Any = CLIPTextModelWithProjection if component == "text_encoder_2" else CLIPTextModel
    with torch.device("meta"):
        model = kind(CLIPTextConfig(hidden_size=1, intermediate_size=1, num_attention_heads=1, num_hidden_layers=1))
    return long(component, path) if hasattr(model, "text_model") else bare(path)


def recognise(tensors: Mapping[str, Tensor]) -> Version | None:
    """Which Stable Diffusion the tensors of an adapter fit, by the width of the text that they attend to or come from.

    None where no tensor tells; a base of one's own may share a width, so fit it afterwards.
    """
    across: dict[int, Version] = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}
    of_text: dict[int, Version] = {768: "sd_v1", 1024: "sd_v2"}
    text_last = sorted(tensors, key=lambda name: name.startswith(("lora_te_", "text_encoder.")))  # SDXL has SD 1's
    for name in text_last:
        tensor = tensors[name]
        if tensor.dim() != 2 or not name.endswith(("lora_down.weight", "lora_A.weight", ".down.weight")):
            continue
        width = tensor.shape[1]
        if any(place in name for place in ("attn2_to_k", "attn2.to_k", "attn2.processor.to_k")):
            return across.get(width)
        if name.startswith(_SECOND) and "fc2" not in name:
            return "sdxl_base_v1-0" if width == 1280 else None
        if name.startswith(("lora_te_", "text_encoder.")) and "fc2" not in name:
            return of_text.get(width)
    return None

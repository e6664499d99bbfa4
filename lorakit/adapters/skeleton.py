"""A base's components without their weights, to hold an adapter's names and shapes against; and a GGUF base whole."""

import json
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CLIPTextConfig, CLIPTextModel, GgufConfig
from transformers.utils import logging as transformers_logging

from lorakit.storage.bases import BaseLocation
from lorakit.storage.foreign import model_errors


def skeleton(base: BaseLocation) -> dict[str, nn.Module]:
    """``model``, or ``unet`` and ``text_encoder``, of a checked folder, on the meta device."""
    with model_errors(base.name, "the config does not make a model"), torch.device("meta"):
        if base.layout == "transformers":
            config = AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
            causal: Any = AutoModelForCausalLM
            return {"model": causal.from_config(config)}
        unet: Any = UNet2DConditionModel
        text = json.loads((base.path / "text_encoder" / "config.json").read_bytes())
        return {
            "unet": unet.from_config(unet.load_config(base.path / "unet", local_files_only=True)),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(text)),
        }


def load_gguf(base: BaseLocation) -> tuple[Any, Any]:
    """Model, de-quantized to float32, and tokenizer of a GGUF file; both can be saved as a plain folder."""
    source = {"gguf_file": base.path.name, "local_files_only": True, "trust_remote_code": False}
    bars: Any = transformers_logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        with model_errors(base.name):
            model: Any = AutoModelForCausalLM.from_pretrained(
                base.path.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **source
            )
            tokenizer = AutoTokenizer.from_pretrained(base.path.parent, **source)
    finally:
        if shown:
            bars.enable_progress_bar()
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    return model, tokenizer

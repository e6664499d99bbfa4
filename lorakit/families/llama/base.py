"""LLaMA-type bases by transformers: tokenizer, config and weights from a checked folder or GGUF file."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from lorakit.errors import ModelError, RecipeError
from lorakit.families.llama import packed
from lorakit.families.place import Place
from lorakit.storage.bases import BaseLocation

GROUPS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "attention+mlp": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
"""Module names behind the recipe's adapter.targets."""

Quantization = Literal["none", "nf4", "int8"]


def load_tokenizer(location: BaseLocation) -> Any:
    """The base's fast tokenizer. Raises ModelError when it cannot be read."""
    # AutoTokenizer would read the whole GGUF header once more, only to find out that this is the class.
    kind: Any = PreTrainedTokenizerFast if location.layout == "gguf" else AutoTokenizer
    with _readable(location):
        return kind.from_pretrained(**_source(location))


def load_config(location: BaseLocation) -> Any:
    """The model's configuration. Raises ModelError when it cannot be read."""
    with _readable(location):
        if location.layout == "gguf":
            return copy.deepcopy(_gguf_config(location, location.path.stat().st_mtime_ns))
        return AutoConfig.from_pretrained(**_source(location))


@lru_cache(maxsize=4)
def _gguf_config(location: BaseLocation, _mtime: int) -> Any:
    """Kept, since reading a GGUF header takes seconds."""
    return AutoConfig.from_pretrained(**_source(location))


def load_model(
    location: BaseLocation, place: Place, quantization: Quantization, *, attention: str = packed.NAME
) -> Any:
    """The whole model on its device, in eval mode; a GGUF file's weights are unpacked to ``place.dtype``.

    ``attention`` is the attention kernel: ``packed.NAME`` to train, "sdpa" to generate.
    Raises ModelError when it cannot be read, RecipeError for a GGUF file to be quantized again.
    """
    options: dict[str, Any] = {"dtype": place.dtype, "attn_implementation": attention}
    if location.layout == "gguf":
        if quantization != "none":
            raise RecipeError(
                "a GGUF file cannot be quantized again", where="base.quantization", hint="take a safetensors folder"
            )
        options |= {"quantization_config": GgufConfig(dequantize=True), "config": load_config(location)}
    else:
        options["use_safetensors"] = True
        if quantization != "none":
            options |= {"quantization_config": _bitsandbytes(quantization, place), "device_map": {"": place.device}}
    with _readable(location):
        model: Any = AutoModelForCausalLM.from_pretrained(**_source(location), **options)
    if location.layout == "gguf":
        _clear_gguf_mark(model)
    if quantization == "nf4":
        _keep_trainable(model)
    return model if quantization != "none" else model.to(place.device)


def check_tokenizer(tokenizer: Any, config: Any, location: BaseLocation) -> None:
    """Raises ModelError when the tokenizer has tokens that the model has no embedding for."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= config.vocab_size:
        raise ModelError(
            f"the tokenizer goes up to token {highest}, the model has {config.vocab_size} embeddings",
            where=location.name,
        )


def _source(location: BaseLocation) -> dict[str, Any]:
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if location.layout == "gguf":
        return {"pretrained_model_name_or_path": str(location.path.parent), "gguf_file": location.path.name, **options}
    return {"pretrained_model_name_or_path": str(location.path), **options}


def _bitsandbytes(quantization: Quantization, place: Place) -> Any:
    make: Any = BitsAndBytesConfig
    if quantization == "int8":
        return make(load_in_8bit=True)
    return make(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=place.dtype,
    )


def _keep_trainable(model: Any) -> None:
    """On a CPU with AVX512-BF16 bitsandbytes repacks 4-bit weights the first time that a layer infers, in a layout that
    gives no gradient ever after: sample answers would end the training of everything below."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _clear_gguf_mark(model: Any) -> None:
    """The weights are plain tensors now; transformers would not save a model that counts as quantized."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


@contextmanager
def _readable(location: BaseLocation) -> Iterator[None]:
    """transformers' errors as ModelError, its progress bars hidden."""
    bars: Any = transformers_logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(f"cannot be loaded: {reason}", where=location.name) from error
    finally:
        if shown:
            bars.enable_progress_bar()


def count_parameters(model: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def logit_factor(config: Any) -> float:
    """What the head's logits are multiplied with (Cohere's and Granite's scaling), 1 for most.

    Raises ModelError for logits that are not linear in the hidden state (soft-capping).
    """
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        if getattr(config, name, None) is not None:
            raise ModelError(f"{config.model_type} caps its logits ({name}), which lorakit does not train")
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)


def longest_document(config: Any) -> int:
    """Tokens that a training row may have: the positions the model knows, or the shortest attention window."""
    windows = [getattr(config, "sliding_window", None)] if getattr(config, "use_sliding_window", True) else []
    return min([int(config.max_position_embeddings), *(int(window) for window in windows if window)])

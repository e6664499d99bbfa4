"""LLaMA-type bases by transformers: tokenizer, config and weights from a checked folder or GGUF file."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from lorakit.data.chat_set import ChatSet, load_chats
from lorakit.data.encoder import check_loads
from lorakit.errors import ModelError, RecipeError
from lorakit.families.llama import packed
from lorakit.families.llama.gguf import unpacked
from lorakit.families.place import Place
from lorakit.recipe.schema import ChatData, LlamaBase
from lorakit.storage.bases import BaseLocation, resolve
from lorakit.storage.foreign import check_complete, model_errors

GROUPS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "attention+mlp": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
"""Module names behind the recipe's adapter.targets."""

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
Quantization = Literal["none", "nf4", "int8"]


def find_base(base: LlamaBase, dtype: torch.dtype) -> tuple[BaseLocation, BaseLocation]:
    """The base as the recipe names it, and the folder to load it from: the same, or what a GGUF file unpacks to.

    Raises RecipeError for a Stable Diffusion, or a GGUF file to be quantized again; ModelError when it cannot be read.
    """
    location = resolve(base.model, base.revision)
    if location.family != "llama":
        raise RecipeError(
            f"{location.name} is a Stable Diffusion", where="base.model", hint="lorakit train-sd trains those"
        )
    if location.layout == "gguf" and base.quantization != "none":
        raise RecipeError(
            "a GGUF file cannot be quantized again", where="base.quantization", hint="take a safetensors folder"
        )
    return location, as_folder(location, dtype)


def as_folder(location: BaseLocation, dtype: torch.dtype) -> BaseLocation:
    """The folder to load a base from. Raises ModelError when a GGUF file cannot be unpacked."""
    with _readable(location):
        return unpacked(location, dtype)


def load_tokenizer(location: BaseLocation) -> Any:
    """The tokenizer of a base's folder. Raises ModelError when it cannot be read, or takes too much to be loaded."""
    if (location.path / "tokenizer.json").is_file():
        check_loads(location.path / "tokenizer.json")
    with _readable(location):
        return AutoTokenizer.from_pretrained(location.path, **_LOCAL)


def load_config(location: BaseLocation) -> Any:
    """The configuration in a base's folder. Raises ModelError when it cannot be read."""
    with _readable(location):
        return AutoConfig.from_pretrained(location.path, **_LOCAL)


def load_model(
    location: BaseLocation, place: Place, quantization: Quantization, *, attention: str = packed.NAME
) -> Any:
    """The whole model of a base's folder on its device, in eval mode.

    ``attention`` is the attention kernel: ``packed.NAME`` to train, "sdpa" to generate.
    Raises ModelError when it cannot be read.
    """
    options: dict[str, Any] = {"dtype": place.dtype, "attn_implementation": attention, "use_safetensors": True}
    if quantization != "none":
        options |= {"quantization_config": _bitsandbytes(quantization, place), "device_map": {"": place.device}}
    with _readable(location):
        build: Any = AutoModelForCausalLM
        model, report = build.from_pretrained(location.path, output_loading_info=True, **_LOCAL, **options)
        check_complete(report, location.name)
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


@contextmanager
def _readable(location: BaseLocation) -> Iterator[None]:
    """transformers' errors as ModelError, its progress bars hidden."""
    bars: Any = transformers_logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        with model_errors(location.name):
            yield
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


def load_data(location: BaseLocation, data: ChatData, seed: int) -> tuple[Any, Any, ChatSet]:
    """The base's config and tokenizer, checked against each other, and the encoded chats. No weights are read."""
    config, tokenizer = load_config(location), load_tokenizer(location)
    check_tokenizer(tokenizer, config, location)
    if data.max_tokens > longest_document(config):
        raise RecipeError(
            f"{data.max_tokens} is more than the {longest_document(config)} tokens that the model attends to",
            where="data.max_tokens",
        )
    return config, tokenizer, load_chats(data, tokenizer, seed)

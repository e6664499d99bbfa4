"""LLaMA-type bases by transformers, which takes seconds to import: tokenizer, config and weights of a folder."""

import json
from typing import Any, Literal

from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lorakit.data.encoder import check_loads
from lorakit.errors import ModelError
from lorakit.families.llama import packed
from lorakit.families.llama.readable import readable
from lorakit.families.place import Place
from lorakit.storage.bases import BaseLocation
from lorakit.storage.foreign import check_complete

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
Quantization = Literal["none", "nf4", "int8"]


def load_tokenizer(location: BaseLocation) -> Any:
    """The tokenizer of a base's folder. Raises ModelError when it cannot be read, or takes too much to be loaded."""
    if (location.path / "tokenizer.json").is_file():
        check_loads(location.path / "tokenizer.json")
    with readable(location):
        return AutoTokenizer.from_pretrained(location.path, **_LOCAL)


def load_config(location: BaseLocation) -> Any:
    """The configuration in a base's folder. Raises ModelError when it cannot be read."""
    with readable(location):
        return AutoConfig.from_pretrained(location.path, **_LOCAL)


def load_fitting_tokenizer(location: BaseLocation, config: Any) -> Any:
    """``load_tokenizer``, brought to the model's embeddings as ``fitted_tokenizer`` does."""
    return fitted_tokenizer(load_tokenizer(location), config, location)


def fitted_tokenizer(tokenizer: Any, config: Any, location: BaseLocation, *, trained: bool = False) -> Any:
    """The tokenizer without what the model has no embedding for and chats do without: a padding token that a trainer
    added, and where it is the base's own special tokens such as Gemma 3's for pictures; those of an adapter that was
    ``trained`` with more tokens were added to be used.

    Raises ModelError for any other token without an embedding.
    """
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= config.vocab_size}
    if not beyond:
        return tokenizer
    written = json.dumps(tokenizer.chat_template, ensure_ascii=False)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    spare = {token for token in ([tokenizer.pad_token] if trained else special) if token and token not in written}
    if beyond.keys() - spare or beyond.keys() & {tokenizer.bos_token, tokenizer.eos_token}:
        raise ModelError(
            f"the tokenizer goes up to token {max(beyond.values())}, the model has {config.vocab_size} embeddings",
            where=location.name,
        )
    return first_tokens(tokenizer, config.vocab_size)


def first_tokens(tokenizer: Any, size: int) -> Any:
    """The tokenizer without added tokens from number ``size`` on."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    gone = {token["content"] for token in rules["added_tokens"] if token["id"] >= size}
    rules["added_tokens"] = [token for token in rules["added_tokens"] if token["id"] < size]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(rules))
    if tokenizer.pad_token in gone:
        tokenizer.pad_token = None
    return tokenizer


def load_model(
    location: BaseLocation, place: Place, quantization: Quantization, *, attention: str | None = packed.NAME
) -> Any:
    """The whole model of a base's folder on its device, in eval mode.

    ``attention`` is the attention kernel: ``packed.NAME`` to train, None for the fastest that the model can take.
    Raises ModelError when it cannot be read.
    """
    options: dict[str, Any] = {"dtype": place.dtype, "attn_implementation": attention, "use_safetensors": True}
    if quantization != "none":
        options |= {"quantization_config": _bitsandbytes(quantization, place)}
    if quantization != "none" or place.device.type == "cuda":  # a tensor at a time, not by way of memory
        options |= {"device_map": {"": place.device}}
    with readable(location):
        build: Any = AutoModelForCausalLM
        model, report = build.from_pretrained(location.path, output_loading_info=True, **_LOCAL, **options)
        check_complete(report, location.name)
    if quantization == "nf4":
        _keep_trainable(model)
    return model if quantization != "none" else model.to(place.device)


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

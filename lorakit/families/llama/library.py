"""LLaMA-type bases by transformers, which takes seconds to import: tokenizer, config and weights of a folder."""

from typing import Any, Literal

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
    """``load_tokenizer``, its tokens held against the model's embeddings as ``check_tokenizer`` does."""
    tokenizer = load_tokenizer(location)
    check_tokenizer(tokenizer, config, location)
    return tokenizer


def check_tokenizer(tokenizer: Any, config: Any, location: BaseLocation) -> None:
    """Raises ModelError when the tokenizer has tokens that the model has no embedding for."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= config.vocab_size:
        raise ModelError(
            f"the tokenizer goes up to token {highest}, the model has {config.vocab_size} embeddings",
            where=location.name,
        )


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

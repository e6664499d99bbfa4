"""GGUF files: unpacked once to a plain folder in the cache, which is then the base.

Reading a GGUF file's header and de-quantizing its weights takes transformers longer than all else before the first step
(half a minute for 135 M parameters); the folder it leaves is memory-mapped in a second. It is made a dtype, so that
each weight is rounded once, from the de-quantized float32.
"""

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast

from lorakit.errors import ConflictError
from lorakit.families.llama.library import first_tokens
from lorakit.families.llama.readable import readable
from lorakit.storage.atomic import new_folder
from lorakit.storage.bases import BaseLocation
from lorakit.storage.foreign import check_complete
from lorakit.storage.gguf_base import check_gguf

log = logging.getLogger("lorakit")


def unpack(location: BaseLocation, folder: Path, dtype: torch.dtype) -> None:
    """Write a GGUF base to ``folder``, with weights in ``dtype``.

    Raises ModelError when the file lacks a tensor or cannot be read, ResourceError when the disk is full.
    """
    log.warning("%s is unpacked once, to %s", location.name, folder)
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(location.path.parent),
        "gguf_file": location.path.name,
        "local_files_only": True,
    }
    with readable(location):
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(**source)
        build: Any = AutoModelForCausalLM
        model, report = build.from_pretrained(
            **source,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            trust_remote_code=False,
            output_loading_info=True,
        )
        check_complete(report, location.name)
        _clear_mark(model)
        model.config.rope_parameters |= check_gguf(location.path)
        model.should_save_on_this_rank = lambda _: True  # the first that comes, and not rank 0 alone
        with suppress(ConflictError), new_folder(folder, manifest=False) as out:  # one without locks may be faster
            model.save_pretrained(out)
            _for_older_readers(out / "config.json")
            # transformers adds GPT-2's <|endoftext|> to each vocabulary of that kind, LLaMA 3's too, behind the last
            # token that the file has.
            size = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
            first_tokens(tokenizer, size).save_pretrained(out)
            settings = json.loads((out / "tokenizer_config.json").read_text())
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # TokenizersBackend is new in transformers 5
            (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _for_older_readers(path: Path) -> None:
    """Positions and dtype where transformers before 5 and others look for them, and take their defaults otherwise."""
    table = json.loads(path.read_text())
    rope = dict(table["rope_parameters"])
    table |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": table["dtype"]}
    table["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    path.write_text(json.dumps(table, indent=2))


def _clear_mark(model: Any) -> None:
    """The weights are plain tensors now; transformers would not save a model that counts as quantized."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False

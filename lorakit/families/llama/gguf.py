"""GGUF files: unpacked once to a plain folder in the cache, which is then the base.

Reading a GGUF file's header and de-quantizing its weights takes transformers longer than all else before the first step
(half a minute for 135 M parameters); the folder it leaves is memory-mapped in a second. It is made a dtype, so that
each weight is rounded once, from the de-quantized float32.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast

from lorakit.errors import ConflictError
from lorakit.families.llama.readable import readable
from lorakit.storage.atomic import new_folder
from lorakit.storage.bases import BaseLocation
from lorakit.storage.foreign import check_complete

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
        try:
            with new_folder(folder, manifest=False) as out:
                model.save_pretrained(out)
                tokenizer.save_pretrained(out)
        except ConflictError:  # another rank was faster
            pass


def _clear_mark(model: Any) -> None:
    """The weights are plain tensors now; transformers would not save a model that counts as quantized."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False

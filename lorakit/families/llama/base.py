"""Which base a recipe names, and what follows from its configuration: nothing here needs transformers."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lorakit.data.cache import content_key, default_folder, versions
from lorakit.data.chat_set import ChatSet, load_chats
from lorakit.errors import ModelError, RecipeError
from lorakit.recipe.schema import ChatData, LlamaBase, LlamaSample
from lorakit.storage.atomic import alone, discard
from lorakit.storage.bases import BaseLocation, description, digest, resolve

GROUPS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "attention+mlp": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
"""Module names behind the recipe's adapter.targets."""


def head_has_an_adapter() -> RecipeError:
    """The loss takes the head as it is: its logits are never kept."""
    return RecipeError("the head (lm_head) cannot have an adapter", where="adapter.targets")


def find_base(base: LlamaBase, dtype: torch.dtype) -> tuple[BaseLocation, BaseLocation]:
    """The base as the recipe names it, and the folder to load it from: the same, or what a GGUF file unpacks to.

    Raises ModelError for a Stable Diffusion, or when it cannot be read; RecipeError for a GGUF file to be quantized.
    """
    location = resolve(base.model, base.revision)
    if location.family != "llama":
        raise ModelError(
            f"{location.name} is a Stable Diffusion model", where="base.model", hint="lorakit train-sd trains those"
        )
    if location.layout == "gguf" and base.quantization != "none":
        raise RecipeError(
            "a GGUF file cannot be quantized again", where="base.quantization", hint="take a safetensors folder"
        )
    return location, as_folder(location, dtype)


UNPACKING = 3
"""Counted up with every change of what is unpacked from the same file."""


def as_folder(location: BaseLocation, dtype: torch.dtype) -> BaseLocation:
    """The folder to load a base from; of a GGUF file the one that it is unpacked to once, with weights in ``dtype``.

    Raises ModelError when a GGUF file cannot be unpacked, ResourceError when the disk is full.
    """
    if location.layout != "gguf":
        return location
    made = f"{digest(location)}-{str(dtype).removeprefix('torch.')}-{UNPACKING} {versions('transformers')}"
    folder = default_folder() / "unpacked" / made.replace(" ", "-")
    found = _whole(folder)
    if found is None:
        from lorakit.families.llama.gguf import unpack  # with transformers

        with alone(folder.parent):  # the ranks of a run need it at the same time
            found = _whole(folder)
            if found is None:
                if os.path.lexists(folder):
                    discard(folder)
                unpack(location, folder, dtype)
                found = resolve(str(folder))
    return BaseLocation(location.name, found.path, found.family, found.layout)


def _whole(folder: Path) -> BaseLocation | None:
    try:
        return resolve(str(folder))
    except ModelError:  # absent, or damaged
        return None


OWN_ATTENTION = {"stablelm"}
"""Models whose attention no other function can take the place of in transformers, so that no packing is told it."""


def check_trainable(config: Any) -> None:
    """Raises ModelError for a base that only merges and generates: its logits are not linear in the hidden state
    (soft-capping), or its attention cannot be told where a chat ends."""
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        if getattr(config, name, None) is not None:
            raise ModelError(f"{config.model_type} caps its logits ({name}), which lorakit does not train")
    if config.model_type in OWN_ATTENTION:
        raise ModelError(f"{config.model_type} has an attention of its own, which lorakit does not train")


def logit_factor(config: Any) -> float:
    """What the head's logits are multiplied with (Cohere's and Granite's scaling), 1 for most."""
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)


def most_positions(config: Any) -> int:
    """Tokens that a model takes: those that it was made for, times the factor that a configuration scales them by
    (linear, YaRN) where it does not count that yet, as Qwen's for long texts do not."""
    known = int(config.max_position_embeddings)
    scaling: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    scaling = scaling.get("full_attention", scaling)  # by the layers' kind
    if scaling.get("rope_type") in ("linear", "yarn"):  # dynamic NTK depends on the texts before
        plain = scaling.get("original_max_position_embeddings") or known
        known = max(known, int(plain * float(scaling.get("factor") or 1.0)))
    return known


def has_windows(config: Any) -> bool:
    """Whether some layer attends to fewer tokens than the model takes."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return window is not None and window < most_positions(config)


def check_sample(sample: LlamaSample, chats: ChatSet) -> None:
    """Raises RecipeError for samples that are asked for what the data does not teach."""
    if chats.raw and sample.system is not None:
        raise RecipeError("the data is raw text, which has no system message", where="sample.system")


def read_chats(location: BaseLocation, config: Any, data: ChatData, seed: int, tokenizer: Callable[[], Any]) -> ChatSet:
    """A recipe's chats, encoded for the base in a folder; ``tokenizer`` is called for those that never were before."""
    if data.max_tokens > most_positions(config):
        raise RecipeError(
            f"{data.max_tokens} is more than the {most_positions(config)} tokens that the model takes",
            where="data.max_tokens",
            hint="lower it: longer chats lose their oldest turns",
        )
    identity = content_key(description(location), versions("transformers", "tokenizers", "jinja2"))
    return load_chats(data, tokenizer, seed, identity)

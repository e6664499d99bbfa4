"""A language model without its weights, to hold an adapter's names and shapes against."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lorakit.adapters.merging.base import OpenBase, open_folder
from lorakit.storage.bases import BaseLocation
from lorakit.storage.foreign import model_errors


def skeleton(folder: BaseLocation, place: AbstractContextManager[object] | None = None) -> dict[str, nn.Module]:
    """``model`` of a checked folder, made in ``place``: on the meta device where none is given.

    Raises ModelError when its config does not make a model.
    """
    with model_errors(folder.name, "the config does not make a model"):
        config = AutoConfig.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
        causal: Any = AutoModelForCausalLM
        with torch.device("meta") if place is None else place:
            return {"model": causal.from_config(config)}


def open_language_model(folder: BaseLocation, place: AbstractContextManager[object] | None = None) -> OpenBase:
    """A folder's headers, for a merge."""
    return open_folder(folder, skeleton(folder, place))

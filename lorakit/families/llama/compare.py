"""What a merged language model says beside base + adapter: the logits of a few prompts."""

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters.merging.base import OpenBase
from lorakit.adapters.merging.plan import PlannedAdapter, QuantBase
from lorakit.adapters.merging.reference import difference, parameters_on_meta, run_from_files
from lorakit.data.encoder import Encoder
from lorakit.families.llama.base import as_folder
from lorakit.families.llama.library import load_tokenizer
from lorakit.families.llama.skeleton import open_language_model
from lorakit.storage.bases import BaseLocation, resolve

PROMPTS = (
    "The capital of France is",
    "What does the function sorted do? It returns",
    "Once upon a time there was a fox who",
    "1, 2, 3, 4, 5,",
)


def compare(
    base: BaseLocation, adapters: Sequence[PlannedAdapter], out: Path, quant_base: QuantBase = "original"
) -> tuple[float, str]:
    """How far the merged model's logits are from base + adapter's, as a share of their spread; and in words.

    In float32, a few rows of a weight in memory at a time. ``quant_base``: see ``merging.plan.Settings``.
    """
    folder = as_folder(base, torch.float32)
    encoder = Encoder(load_tokenizer(folder))
    ids = [encoder.encode(prompt)[0].tolist() for prompt in PROMPTS]
    expected = _logits(_opened(folder, quant_base), adapters, ids)
    found = _logits(_opened(resolve(str(out)), "original"), (), ids)
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(expected, found, strict=True))
    count = sum(logits.shape[0] for logits in expected)
    share = difference(expected, found)
    return share, f"logits of {len(ids)} prompts differ by {share:.2%}, {same} of {count} likeliest tokens are the same"


def _opened(folder: BaseLocation, quant_base: QuantBase) -> OpenBase:
    opened = open_language_model(folder, parameters_on_meta())
    if quant_base == "original":
        return opened
    from lorakit.adapters.merging.nf4 import as_trained  # bitsandbytes takes seconds to import

    return replace(opened, sources=as_trained(opened))


def _logits(opened: OpenBase, adapters: Sequence[PlannedAdapter], ids: Sequence[list[int]]) -> list[Tensor]:
    """[tokens, V] for each prompt. They run together, so that a weight is read once: what fills the shorter ones up
    comes behind, where no token before it attends to it."""
    run_from_files(opened, adapters)
    model: Any = opened.models["model"]
    longest = max(map(len, ids))
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([x + [0] * (longest - len(x)) for x in ids]), use_cache=False).logits
    del model, opened
    gc.collect()  # what was read stays in its layers' circles else
    return [row[: len(x)].float() for row, x in zip(logits, ids, strict=True)]

"""What a merged language model says beside base + adapter: the logits of a few prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters.merging.base import OpenBase
from lorakit.adapters.merging.outputs import Comparison, difference, side_by_side
from lorakit.adapters.merging.parallel import Crew
from lorakit.adapters.merging.plan import PlannedAdapter, QuantBase
from lorakit.adapters.merging.reference import parameters_on_meta, run_from_files
from lorakit.adapters.merging.source import Source
from lorakit.data.encoder import Encoder
from lorakit.errors import ModelError
from lorakit.families.llama.base import as_folder
from lorakit.families.llama.library import load_config, load_tokenizer
from lorakit.families.llama.skeleton import open_language_model
from lorakit.storage.bases import BaseLocation, resolve

PROMPTS = ("The capital of France is the city of", "def add(a, b): return a", "Once upon a time there was a")
LONGEST = 8
"""Tokens of a prompt that are taken: products with them cost more than reading the weights else."""


def compare(
    base: BaseLocation,
    adapters: Sequence[PlannedAdapter],
    out: Path,
    quant_base: QuantBase = "original",
    sources: Mapping[str, Source] = {},
    crew: Crew | None = None,
) -> Comparison:
    """How far the merged model's logits are from base + adapter's.

    In float32, a few rows of a weight in memory at a time. ``quant_base``: see ``merging.plan.Settings``; ``sources``:
    what to read the merged model's files through, by path.
    """
    folder = as_folder(base, torch.float32)
    ids, told = _prompts(folder)
    crew = crew or Crew(0, None)
    one = _opened(folder, quant_base).told(crew.go_on)
    other = _opened(resolve(str(out)), "original").read_through(sources)
    run_from_files(one, adapters, other)
    run_from_files(other)
    expected, rounded, found = side_by_side(crew, lambda: _logits(one, [*ids, *ids]), lambda: _logits(other, ids))
    share, rounding = difference(expected, found), difference(expected, rounded)
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(expected, found, strict=True))
    count = sum(map(len, ids))
    told = f"logits of {told} differ by {share:.2%}, {same} of {count} likeliest tokens are the same"
    return Comparison(share, rounding, told)


def _prompts(folder: BaseLocation) -> tuple[list[list[int]], str]:
    """Their tokens, and what they are. A base without a tokenizer needs none to be compared."""
    try:
        encoder = Encoder(load_tokenizer(folder))
    except ModelError:
        shape, generator = (len(PROMPTS), LONGEST), torch.Generator().manual_seed(0)
        ids = torch.randint(load_config(folder).vocab_size, shape, generator=generator).tolist()
        return ids, f"{len(ids)} rows of random tokens, for want of a tokenizer,"
    return [encoder.encode(prompt)[0].tolist()[:LONGEST] for prompt in PROMPTS], f"{len(PROMPTS)} prompts"


def _opened(folder: BaseLocation, quant_base: QuantBase) -> OpenBase:
    opened = open_language_model(folder, parameters_on_meta())
    if quant_base == "original":
        return opened
    from lorakit.adapters.merging.nf4 import as_trained  # bitsandbytes takes seconds to import

    return opened.read_through(as_trained(opened))


def _logits(opened: OpenBase, ids: Sequence[list[int]]) -> list[Tensor]:
    """[tokens, V] for each prompt. They run together, so that a weight is read once: what fills the shorter ones up
    comes behind, where no token before it attends to it."""
    model: Any = opened.models["model"]
    longest = max(map(len, ids))
    logits = model(input_ids=torch.tensor([x + [0] * (longest - len(x)) for x in ids]), use_cache=False).logits
    return [row[: len(x)].float() for row, x in zip(logits, ids, strict=True)]

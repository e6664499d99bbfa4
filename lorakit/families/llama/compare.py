"""What a merged language model says beside base + adapter: the logits of a few prompts."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters.reference import difference, put_on
from lorakit.data.encoder import Encoder
from lorakit.families.llama.base import as_folder
from lorakit.families.llama.library import Quantization, load_model, load_tokenizer
from lorakit.families.place import Place
from lorakit.storage.bases import BaseLocation, resolve

PROMPTS = (
    "The capital of France is",
    "What does the function sorted do? It returns",
    "Once upon a time there was a fox who",
    "1, 2, 3, 4, 5,",
)
PLACE = Place(torch.device("cpu"), torch.float32)


def compare(
    base: BaseLocation, adapters: Sequence[tuple[Path, float]], out: Path, quantization: Quantization = "none"
) -> tuple[float, str]:
    """How far the merged model's logits are from base + adapter's, as a share of their spread; and in words.

    In float32, one model in memory at a time. ``quantization`` is what training saw the base through.
    """
    folder = as_folder(base, PLACE.dtype)
    encoder = Encoder(load_tokenizer(folder))
    ids = [torch.tensor([encoder.encode(prompt)[0].tolist()]) for prompt in PROMPTS]
    model = load_model(folder, PLACE, quantization, attention="sdpa")
    put_on({"model": model}, adapters)
    expected = _logits(model, ids)
    del model
    gc.collect()
    found = _logits(load_model(resolve(str(out)), PLACE, "none", attention="sdpa"), ids)
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(expected, found, strict=True))
    count = sum(logits.shape[0] for logits in expected)
    share = difference(expected, found)
    return share, f"logits of {len(ids)} prompts differ by {share:.2%}, {same} of {count} likeliest tokens are the same"


def _logits(model: Any, ids: Sequence[Tensor]) -> list[Tensor]:
    with torch.inference_mode():
        return [model(input_ids=prompt, use_cache=False).logits[0].float() for prompt in ids]

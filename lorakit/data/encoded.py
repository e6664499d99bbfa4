"""Examples to rows, each different one once: what the tokenizer made of the same data before is read from the cache.

An entry holds all rows of a recipe's examples, R in number, one after another.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lorakit.data.cache import TensorCache, content_key, default_folder
from lorakit.data.chat import Chat, Example
from lorakit.data.records import OnBad
from lorakit.data.tokens import Encoded, Renderer
from lorakit.errors import DataError

Rows = dict[str, list[Encoded]]
"""By what the example says."""


def encode(
    examples: Sequence[Example], renderer: Callable[[], Renderer], identity: str, on_bad: OnBad
) -> dict[int, list[Encoded]]:
    """The rows of every example by its ``id``; a bad one, which has none, is told to ``on_bad``.

    ``renderer`` is called only when the cache lacks an example; ``identity`` says all that it is made from.
    """
    contents = {id(example): _content(example) for example in examples}
    order = sorted(set(contents.values()))
    cache, key = TensorCache(default_folder() / "rows"), content_key("rows 5", identity, *order)
    known = _unpacked(cache.read(key), order) if cache.holds(key) else Rows()
    before, found = len(known), dict[int, list[Encoded]]()
    for example in examples:
        if id(example) in found:
            continue
        content, found[id(example)] = contents[id(example)], []
        try:
            if content not in known:
                known[content] = renderer().encode(example)
        except DataError as error:
            on_bad(error)
        else:
            found[id(example)] = [replace(row, where=example.where) for row in known[content]]
    if len(known) > before:
        cache.offer(key, _packed(known, order))
    return found


def _content(example: Example) -> str:
    """A key for all that an example's rows depend on."""
    if isinstance(example, Chat):
        said = ((m.role, m.reasoning, m.content, int(m.learned), m.calls, m.answers) for m in example.messages)
        return content_key(example.messages[0].tools, *(part for parts in said for part in parts))
    return content_key(example.prompt, example.completion)


def _packed(rows: Mapping[str, Sequence[Encoded]], order: Sequence[str]) -> dict[str, Tensor]:
    """``tokens`` int32 and ``labels`` bool of all rows, and int64 [R, 5]: example (its place in ``order``), length, cut
    and whether it is ``alone`` and ``opened``."""
    listed = [(number, row) for number, content in enumerate(order) for row in rows.get(content, ())]
    numbers = [(number, len(row.tokens), row.cut, row.alone, row.opened) for number, row in listed]
    return {
        "tokens": torch.from_numpy(np.concatenate([row.tokens for _, row in listed])),
        "labels": torch.from_numpy(np.concatenate([row.labels for _, row in listed])),
        "numbers": torch.tensor(numbers),
    }


def _unpacked(tensors: Mapping[str, Tensor], order: Sequence[str]) -> Rows:
    rows, start = Rows(), 0
    tokens, labels = tensors["tokens"].numpy(), tensors["labels"].numpy()
    for number, length, cut, alone, opened in tensors["numbers"].tolist():
        place = slice(start, start + length)
        row = Encoded(tokens[place], labels[place], "", cut, bool(alone), bool(opened))
        rows.setdefault(order[number], []).append(row)
        start += length
    return rows

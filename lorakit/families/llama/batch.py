"""Token rows to micro-batches: packed into one row, or padded to the longest."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lorakit.data.tokens import Encoded
from lorakit.numerics.order import Layout, micro_batches


@dataclass
class ChatBatch:
    """One micro-batch. The tokens after a row's last label are left out: nothing is learned from them."""

    tokens: Tensor
    """int64 [B, T]; packed: B = 1."""
    positions: Tensor
    """int64 [B, T], from 0 in each document."""
    documents: tuple[int, tuple[int, ...]] | None
    """Of a packed row: the tokens at its start that begin every document, and each document's own ones behind them."""
    rows: Tensor
    """int64 [N]: places b * T + t whose next token is learned."""
    targets: Tensor
    """int64 [N]"""
    ids: tuple[str, ...]
    count: int
    """N"""

    def to(self, device: torch.device) -> "ChatBatch":
        names = ("tokens", "positions", "rows", "targets")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def collate(examples: Sequence[Encoded], *, packing: bool, sharing: bool = True) -> ChatBatch:
    """One micro-batch of at least one example.

    ``sharing``: tokens that begin all documents of a packed row stand in it once.
    """
    ends = [int(np.flatnonzero(example.labels)[-1]) for example in examples]
    shared = _common(examples, min(ends) - 1) if packing and sharing and len(examples) > 1 else 0
    own = [end - shared for end in ends]
    width = shared + sum(own) if packing else max(ends)
    starts = shared + np.concatenate([[0], np.cumsum(own)[:-1]]) if packing else np.arange(len(ends)) * width
    tokens = np.zeros(width if packing else width * len(ends), np.int64)
    positions, rows, targets = np.zeros_like(tokens), [], []
    tokens[:shared], positions[:shared] = examples[0].tokens[:shared], np.arange(shared)
    for example, start, end in zip(examples, starts, ends, strict=True):
        place = slice(start, start + end - shared)
        tokens[place], positions[place] = example.tokens[shared:end], np.arange(shared, end)
        learned = np.flatnonzero(example.labels[1 : end + 1])
        rows.append(np.where(learned < shared, learned, start - shared + learned))
        targets.append(example.tokens[learned + 1])
    shape = (1, width) if packing else (len(ends), width)
    return ChatBatch(
        torch.from_numpy(tokens).view(shape),
        torch.from_numpy(positions).view(shape),
        (shared, tuple(own)) if packing else None,
        torch.from_numpy(np.concatenate(rows).astype(np.int64)),
        torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        tuple(example.where for example in examples),
        sum(map(len, targets)),
    )


def _common(examples: Sequence[Encoded], most: int) -> int:
    """How many tokens all examples begin with, at most ``most``."""
    first = examples[0].tokens[:most]
    differs = np.any([example.tokens[:most] != first for example in examples[1:]], axis=0)
    return int(np.argmax(differs)) if differs.any() else most


def empty_batch() -> ChatBatch:
    """Nothing to learn, one token to run through the model: keeps ranks in step."""
    none, one = torch.zeros(0, dtype=torch.int64), torch.zeros((1, 1), dtype=torch.int64)
    return ChatBatch(one, one, (0, (1,)), none, none, (), 0)


def train_batches(
    examples: Sequence[Encoded], layout: Layout, start: int, *, packing: bool, sharing: bool = True
) -> Iterator[ChatBatch]:
    """This rank's micro-batches from optimizer step ``start`` on, endless, rows of like length together."""
    lengths = [len(example.tokens) for example in examples]
    for draws in micro_batches(layout, lengths, start):
        yield collate([examples[draw.index] for draw in draws], packing=packing, sharing=sharing)


def held_out_batches(examples: Sequence[Encoded], layout: Layout, *, packing: bool) -> Iterator[ChatBatch]:
    """Each example once over all ranks, longest first; every rank yields equally many, empty ones at the end."""
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].tokens), i))
    size = layout.micro_batch
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    for place in range(0, len(chunks), layout.world):
        mine = place + layout.rank
        if mine < len(chunks):
            yield collate([examples[i] for i in chunks[mine]], packing=packing)
        else:
            yield empty_batch()

"""Where the documents of a packed row are, and how attention lays their numbers out.

    row = [tokens that begin every document, once] [document 1] [document 2] ...

Documents that begin alike (a system prompt, a template's marks) share those tokens: causal attention gives them the
same states in each document, so they are computed once and every document attends to them.

Shapes: ``T`` tokens of the row, ``K`` key-value heads, ``P`` shared tokens; for the ``n`` documents of like length that
make a group: ``L`` own tokens of the longest, ``S >= P + L`` keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

PADDING = 1.15
"""A group of documents, each padded to its longest, has at most so many times their own tokens."""

ALIGNED = 32
"""Keys are padded to a multiple of this: softmax over a row of another length is up to three times as slow."""


@dataclass(frozen=True)
class Group:
    """Documents of like length that are attended to together, one after the other in the row."""

    start: int
    """Of their own tokens in the row."""
    shared: int
    """P, or 0 for the shared tokens themselves."""
    lengths: tuple[int, ...]
    """Own tokens of each."""

    @property
    def count(self) -> int:
        """n"""
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """L"""
        return max(self.lengths)

    @property
    def width(self) -> int:
        """S"""
        return _aligned(self.shared + self.longest)

    def own(self) -> Tensor:
        """Places in the row, int64 [n, S - P]; a shorter document repeats its last one."""
        lengths = torch.tensor(self.lengths)[:, None]
        starts = self.start + lengths.cumsum(0) - lengths
        return starts + torch.arange(self.width - self.shared).minimum(lengths - 1)


@dataclass(frozen=True)
class Block:
    """Some of the own tokens of each document in a group, as queries."""

    queries: slice
    """Which of the laid-out ones: [n * K, b] of them."""
    first: int
    """Keys that come before its first query."""
    seen: int
    """Keys that any of its queries sees, aligned; in the last block S."""


@dataclass(frozen=True)
class LaidGroup:
    """Where a group's queries and keys are."""

    matrices: int
    """n * K"""
    keys: slice
    """[n * K, S] of the laid-out ones."""
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Laid:
    """Where the rows [T * K, ...] of a packed row's numbers, K to a token, stand when they are laid out: group after
    group, of each the queries [n, K, b] of block after block, and the keys [n, K, S], the shared tokens' first."""

    queries: Tensor
    """int64: which row stands there; a shorter document repeats its last ones."""
    keys: Tensor
    """int64, likewise."""
    once: Tensor | None
    """bool, as many as ``queries`` by 1: False for repeats; None where there are none."""
    own_queries: Tensor
    """int64 [T * K]: where each row stands among the queries, once."""
    own_keys: Tensor
    """int64 [T * K]: where it stands among the keys, the shared tokens' in the group of their own."""
    shared_keys: Tensor | None
    """int64 [documents, P * K]: where the shared tokens' stand before each document's own; None where P is 0."""
    groups: tuple[LaidGroup, ...]
    _masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict, compare=False)

    def mask(self, block: Block, share: int, like: Tensor) -> Tensor:
        """0 where a block's queries may look, -inf where they may not, in the dtype of ``like`` [n * K, b * share, D],
        ``share`` rows a query: [b * share, seen]. The block's query ``i`` sees the keys up to ``first + i``."""
        count = like.shape[1] // share
        key = count, block.first, block.seen, share, like.dtype
        if key not in self._masks:
            late = torch.arange(block.seen) > torch.arange(block.first, block.first + count)[:, None]
            mask = torch.zeros(late.shape).masked_fill_(late, float("-inf"))
            self._masks[key] = mask.repeat_interleave(share, 0).to(like.device, like.dtype)
        return self._masks[key]


@dataclass(frozen=True)
class Packing:
    """Where the documents of a row are; made once a row, used in every layer."""

    shared: int
    """Tokens at the row's start that stand before each document."""
    lengths: tuple[int, ...]
    """Own tokens of each document, in order; with ``shared`` they sum to the row."""
    groups: tuple[Group, ...]
    device: torch.device
    _laid: dict[tuple[int, int | None], Laid] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, lengths: Sequence[int], shared: int = 0, device: torch.device | str = "cpu") -> "Packing":
        """Raises ValueError when a document has no token of its own."""
        if not lengths or min(lengths) < 1 or shared < 0:
            raise ValueError(f"no packing of {shared} shared tokens and documents of {list(lengths)}")
        groups = [Group(0, 0, (shared,))] if shared else []
        place, waiting = shared, tuple(lengths)
        while waiting:
            count = _alike(waiting)
            groups.append(Group(place, shared, waiting[:count]))
            place, waiting = place + sum(waiting[:count]), waiting[count:]
        return cls(shared, tuple(lengths), tuple(groups), torch.device(device))

    @property
    def tokens(self) -> int:
        """T"""
        return self.shared + sum(self.lengths)

    def laid(self, heads: int, block: int | None = None) -> Laid:
        """The layout of ``heads`` rows a token, with at most ``block`` queries of a document in a block; None: all."""
        if (heads, block) not in self._laid:
            self._laid[heads, block] = _lay(self, heads, block)
        return self._laid[heads, block]


def _aligned(keys: int) -> int:
    return -(-keys // ALIGNED) * ALIGNED


def _alike(lengths: Sequence[int]) -> int:
    """How many of the first documents make a group."""
    longest = total = 0
    for count, length in enumerate(lengths):
        longest, total = max(longest, length), total + length
        if longest * (count + 1) > PADDING * total:
            return count
    return len(lengths)


def _lay(packing: Packing, heads: int, block: int | None) -> Laid:
    def rows(places: Tensor) -> Tensor:
        """[n, tokens] -> [n, K, tokens]"""
        return places[:, None] * heads + torch.arange(heads)[:, None]

    own_queries, own_keys = (torch.empty(packing.tokens * heads, dtype=torch.int64) for _ in range(2))
    queries, keys, once, shared_keys, groups = [], [], [], [], []
    asked = held = 0  # queries and keys that are laid out so far
    for group in packing.groups:
        own = group.own()
        real = (torch.arange(group.longest) < torch.tensor(group.lengths)[:, None])[:, None].expand(-1, heads, -1)
        seen = rows(torch.cat([torch.arange(group.shared).expand(group.count, -1), own], 1))
        places = held + torch.arange(seen.numel()).view(seen.shape)
        begun, behind = places.split([group.shared, group.width - group.shared], -1)
        own_keys[rows(own)[..., : group.longest][real]] = behind[..., : group.longest][real]
        shared_keys += [begun.transpose(1, 2).flatten(1)] if group.shared else []
        keys.append(seen.flatten())
        group_keys, blocks = slice(held, held + seen.numel()), []
        held = group_keys.stop
        for first, last in pairwise([*range(0, group.longest, block or group.longest), group.longest]):
            chosen, kept = rows(own[:, first:last]), real[..., first:last]
            places = asked + torch.arange(chosen.numel()).view(chosen.shape)
            own_queries[chosen[kept]] = places[kept]
            queries.append(chosen.flatten())
            once.append(kept.flatten())
            place = slice(asked, asked + chosen.numel())
            blocks.append(Block(place, group.shared + first, _aligned(group.shared + last)))
            asked = place.stop
        groups.append(LaidGroup(group.count * heads, group_keys, tuple(blocks)))

    def put(part: Tensor) -> Tensor:
        return part.to(packing.device, non_blocking=True)

    mask = torch.cat(once)[:, None]
    return Laid(
        put(torch.cat(queries)),
        put(torch.cat(keys)),
        None if mask.all() else put(mask),
        put(own_queries),
        put(own_keys),
        put(torch.cat(shared_keys)) if shared_keys else None,
        tuple(groups),
    )

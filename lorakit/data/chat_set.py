"""The token rows that a LLaMA trains on, and what became of the data on the way."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lorakit.data.chat import Example
from lorakit.data.chat_sources import read_split
from lorakit.data.records import OnBad, fail
from lorakit.data.tokens import Encoded, Renderer
from lorakit.errors import DataError
from lorakit.recipe.schema import ChatData
from lorakit.storage.fingerprint import Fingerprint, row_hash


@dataclass(frozen=True)
class ChatSet:
    train: tuple[Encoded, ...]
    """Weights applied: a row of weight 2 stands here twice."""
    held_out: tuple[Encoded, ...]
    skipped: tuple[DataError, ...]
    """Bad rows that were left out."""
    repeated: int
    """Training rows that also stand in held-out sources."""

    @property
    def tokens(self) -> int:
        """Tokens of the training rows."""
        return sum(len(row.tokens) for row in self.train)

    @property
    def label_share(self) -> float:
        """Learned tokens of all in the training rows."""
        return sum(row.count for row in self.train) / self.tokens

    @property
    def cut(self) -> tuple[int, int]:
        """Training rows that were longer than max_tokens, and the tokens they lost."""
        return sum(row.cut > 0 for row in self.train), sum(row.cut for row in self.train)

    def fingerprint(self) -> Fingerprint:
        """Every row's place, and a hash of its tokens and labels."""
        parts = (self.train, self.held_out)
        return Fingerprint(*([(r.where, row_hash(r.tokens.tobytes(), r.labels.tobytes())) for r in p] for p in parts))

    def notes(self) -> list[str]:
        """What a user should know, one line each: rows skipped, cut, repeated, turns without labels."""
        lines = [f"skipped {error}" for error in self.skipped[:10]]
        if len(self.skipped) > 10:
            lines.append(f"skipped {len(self.skipped)} rows in all")
        rows, tokens = self.cut
        if rows:
            lines.append(f"{rows} of {len(self.train)} training rows were longer than max_tokens: {tokens} tokens cut")
        turns = sum(row.unlearned_turns for row in self.train)
        if turns:
            lines.append(f"{turns} earlier answers have no labels, because the chat template rewrites them")
        if self.repeated:
            lines.append(f"{self.repeated} training rows also stand in the held-out data: its loss is flattered")
        return lines


def load_chats(data: ChatData, tokenizer: Any, seed: int) -> ChatSet:
    """Read, split, weigh and encode a recipe's chats; the same ones on every rank.

    Raises DataError for a bad row (``on_bad: fail``) or when no training row is left, ModelError for a tokenizer or
    template that will not do.
    """
    renderer = Renderer(tokenizer, data.chat_template, data.max_tokens)
    split = read_split(data, seed)
    on_bad: OnBad = split.skipped if data.on_bad == "skip" else fail
    known: dict[int, list[Encoded]] = {}
    train, held_out = (_encode(part, renderer, on_bad, known) for part in (split.train, split.held_out))
    if not train:
        raise DataError("no training row is left", where="data.train", hint="the skipped rows say why")
    return ChatSet(tuple(train), tuple(held_out), tuple(split.skipped.errors), split.repeated)


def _encode(
    part: Iterable[Example], renderer: Renderer, on_bad: OnBad, known: dict[int, list[Encoded]]
) -> list[Encoded]:
    """Rows in order; an example that comes again (by identity) is encoded once."""
    rows: list[Encoded] = []
    for example in part:
        if id(example) not in known:
            known[id(example)] = []
            try:
                known[id(example)] = renderer.encode(example)
            except DataError as error:
                on_bad(error)
        rows += known[id(example)]
    return rows

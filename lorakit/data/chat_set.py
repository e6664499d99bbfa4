"""The token rows that a LLaMA trains on, and what became of the data on the way."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from lorakit.data.cache import content_key
from lorakit.data.chat import Chat
from lorakit.data.chat_sources import read_split
from lorakit.data.encoded import encode
from lorakit.data.templates import named_source
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
    raw: bool
    """Whether no training row went through the chat template."""

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
        """What a user should know, one line each: rows skipped, cut, repeated, answers alone."""
        lines = [f"skipped {error}" for error in self.skipped[:10]]
        if len(self.skipped) > 10:
            lines.append(f"skipped {len(self.skipped)} rows in all")
        rows, tokens = self.cut
        if rows:
            lines.append(f"{rows} of {len(self.train)} training rows were longer than max_tokens: {tokens} tokens cut")
        alone = sum(row.alone for row in self.train)
        if alone:
            lines.append(
                f"{alone} earlier answers are rows of their own: the chat template rewrites them later in a chat"
            )
        if opened := sum(row.opened for row in self.train):
            lines.append(
                f"{opened} rows are learned without what the chat template opens an answer with when it is asked for "
                "one (a thought, say): answers may differ from what was learned; a data.chat_template without it helps"
            )
        if self.repeated:
            lines.append(f"{self.repeated} training rows also stand in the held-out data: its loss is flattered")
        return lines


def load_chats(data: ChatData, tokenizer: Callable[[], Any], seed: int, identity: str) -> ChatSet:
    """Read, split, weigh and encode a recipe's chats; the same ones on every rank.

    ``tokenizer`` is called only for rows that are not in the cache; ``identity`` says all that it is made from.
    Raises DataError for a bad row (``on_bad: fail``) or when no training row is left, ModelError for a tokenizer or
    template that will not do.
    """
    split = read_split(data, seed)
    renderer = cache(lambda: Renderer(tokenizer(), data.chat_template, data.max_tokens))
    identity = content_key(identity, named_source(data.chat_template) or repr(data.chat_template), data.max_tokens)
    rows = encode((*split.train, *split.held_out), renderer, identity, split.rejects)
    train, held_out = (tuple(row for e in part for row in rows[id(e)]) for part in (split.train, split.held_out))
    if not train:
        raise DataError("no training row is left", where="data.train", hint=split.rejects.first())
    raw = not any(isinstance(example, Chat) for example in split.train)
    return ChatSet(train, held_out, tuple(split.rejects.errors), split.repeated, raw)

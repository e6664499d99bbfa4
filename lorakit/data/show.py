"""Training rows as the model sees them, for people: pieces with their labels, and how long rows are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lorakit.data.tokens import Encoded

CONTEXT = 4
"""Tokens decoded before a piece, since some tokenizers drop a text's first blank."""
LONGEST_CHARACTER = 8
"""Tokens after which a piece is shown even when they make no character."""


class Piece(NamedTuple):
    """A run of whole characters: one token, or the few that make up a character between them."""

    text: str
    labelled: bool


@dataclass(frozen=True)
class ShownRow:
    where: str
    pieces: tuple[Piece, ...]
    tokens: int
    labels: int
    cut: int


class Bar(NamedTuple):
    """Rows of ``low`` to ``high`` tokens, both included."""

    low: int
    high: int
    rows: int


def show_row(row: Encoded, tokenizer: Any) -> ShownRow:
    """A row as pieces of text, special tokens written out; tokens are held together until they decode to characters.

    A piece counts as labelled when its last token is.
    """
    tokens, start, pieces = row.tokens.tolist(), 0, []
    for end in range(1, len(tokens) + 1):
        before, text = (
            tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for part in (tokens[max(0, start - CONTEXT) : start], tokens[max(0, start - CONTEXT) : end])
        )
        whole = not text.endswith("\N{REPLACEMENT CHARACTER}") or end - start >= LONGEST_CHARACTER
        if whole or end == len(tokens):
            pieces.append(Piece(text[len(before) :], bool(row.labels[end - 1])))
            start = end
    return ShownRow(row.where, tuple(pieces), len(row.tokens), row.count, row.cut)


def token_histogram(rows: Sequence[Encoded], bars: int = 12) -> list[Bar]:
    """Counts of rows by length, in ``bars`` steps of equal width from 1 to the longest row."""
    longest = max(len(row.tokens) for row in rows)
    width = -(-longest // bars)
    counts = [0] * (-(-longest // width))
    for row in rows:
        counts[(len(row.tokens) - 1) // width] += 1
    return [Bar(n * width + 1, (n + 1) * width, count) for n, count in enumerate(counts)]

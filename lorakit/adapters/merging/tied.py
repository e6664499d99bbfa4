"""A head that shares the embedding's weight, and what happens when an adapter parts them."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.delta import Delta
from lorakit.adapters.merging.base import Home, OpenBase
from lorakit.adapters.merging.change import Change, Rows, Term, Whole
from lorakit.adapters.merging.stream import OutFile, Span, Target

ROWS = 1024
"""Rows of two whole tensors that are compared at a time."""


def tied_by_config(models: Mapping[str, nn.Module]) -> tuple[str, str] | None:
    """The names of the head's and the embedding's weight where the config ties them: PEFT goes by it for tokens."""
    model: Any = models.get("model")
    if model is None or not model.config.tie_word_embeddings:
        return None
    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = names[id(model.get_output_embeddings())], names[id(model.get_input_embeddings())]
    return f"{head}.weight", f"{embedding}.weight"


def with_tied(name: str, trained: Container[str], tied: tuple[str, str] | None) -> tuple[str, ...]:
    """The tensors that tokens of ``name`` are in, as PEFT computes them: those of a tied embedding in its head too,
    unless that is ``trained`` itself, among modules that have tokens; those of a head in nothing else."""
    if tied is None or name != tied[1] or tied[0].removesuffix(".weight") in trained:
        return (name,)
    return name, tied[0]


def tied_names(base: OpenBase) -> tuple[str, str] | None:
    """``tied_by_config``, unless the files hold a head that differs from the embedding: transformers takes it then."""
    tied = tied_by_config(base.models)
    if tied is None:
        return None
    own, shared = (base.home("model", name) for name in tied)
    return None if own is not None and shared is not None and not _equal_rows(base, own, shared) else tied


def _equal_rows(base: OpenBase, one: Home, other: Home) -> bool:
    if one.last - one.first != other.last - other.first:
        return False
    starts = range(0, one.last - one.first, ROWS)
    return all(torch.equal(_rows(base, one, start), _rows(base, other, start)) for start in starts)


def _rows(base: OpenBase, home: Home, start: int) -> Tensor:
    first = home.first + start
    return base.sources[home.file].rows(home.name, first, min(first + ROWS, home.last))


def equal_terms(ours: Sequence[Term], theirs: Sequence[Term]) -> bool:
    """Whether two lists of changes say the same."""
    return len(ours) == len(theirs) and all(
        one_weight == other_weight and _same(one, other)
        for (one, one_weight), (other, other_weight) in zip(ours, theirs, strict=True)
    )


def _same(one: Delta | Whole | Rows, other: Delta | Whole | Rows) -> bool:
    if isinstance(one, Rows) or isinstance(other, Rows):
        return one is other
    if isinstance(one, Delta) and isinstance(other, Delta):
        plain = one.magnitude is None and other.magnitude is None and one.scale == other.scale
        return plain and torch.equal(one.A, other.A) and torch.equal(one.B, other.B)
    if isinstance(one, Delta) or isinstance(other, Delta):
        return False
    slot = one.source.slots[one.name]
    spans = [(first, min(first + ROWS, slot.rows)) for first in range(0, slot.rows, ROWS)]
    return slot == other.source.slots[other.name] and all(
        torch.equal(one.source.rows(one.name, *span), other.source.rows(other.name, *span)) for span in spans
    )


def untied(files: Mapping[str, OutFile], base: OpenBase, tied: tuple[str, str], change: Change) -> dict[str, OutFile]:
    """The files with a head of its own, the base's embedding changed as ``change`` says, behind the embedding's."""
    head, embedding = tied
    home = base.homes["model"][embedding]
    slot = files[home.file].tensors[home.name].slot
    span = Span(base.sources[home.file], home.name, home.first, home.last, change if change.terms else None)
    kept = base.homes["model"].get(head, home).file
    tensors = files[kept].tensors | {head: Target(slot, (span,))}
    return {**files, kept: replace(files[kept], tensors=tensors)}

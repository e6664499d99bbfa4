"""A matrix that a single file holds transposed: what is there the other way round, and a change of it likewise."""

from dataclasses import replace

from torch import Tensor

from lorakit.adapters.delta import Delta
from lorakit.adapters.merging.change import Change, Rows, Whole
from lorakit.adapters.merging.source import Source
from lorakit.errors import ModelError


class Turned:
    """Another source with every matrix transposed; one is read whole, however few of its rows are asked for."""

    def __init__(self, source: Source) -> None:
        self.metadata = source.metadata
        self.slots = {name: slot._replace(shape=slot.shape[::-1]) for name, slot in source.slots.items()}
        self._source = source

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """[last - first, columns]: columns of the other source's tensor."""
        whole = self._source.rows(name, 0, self._source.slots[name].rows)
        return whole[:, first:last].T.contiguous()


def turned(change: Change) -> Change:
    """What ``change`` does, to the transpose: (B A)^T = A^T B^T.

    Raises ModelError for DoRA, which scales rows of the one and so columns of the other.
    """
    return Change([(_turned(what), weight) for what, weight in change.terms], change.dtype)


def _turned(what: Delta | Whole | Rows) -> Delta | Whole:
    assert not isinstance(what, Rows), "language models' embeddings alone have single rows"
    if isinstance(what, Whole):
        return Whole(Turned(what.source), what.name)
    if what.magnitude is not None:
        reason = "DoRA of a matrix that a single file holds transposed is not added"
        raise ModelError(reason, hint="merge a diffusers folder into a folder")
    return replace(what, A=what.B.T.contiguous(), B=what.A.T.contiguous())

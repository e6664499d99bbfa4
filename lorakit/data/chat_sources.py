"""Sources to the training and held-out examples: formats told, bad rows counted, split and weights by the seed."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lorakit.data.cache import content_key
from lorakit.data.chat import Chat, Example, parse, tell, unfold
from lorakit.data.records import OnBad, Record, Rejects, read_records
from lorakit.errors import DataError, shown
from lorakit.numerics.order import mix
from lorakit.recipe.schema import ChatData, ChatSource


@dataclass(frozen=True)
class Split:
    """Examples by split; a training example comes as often as ``train`` has it, weights applied."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    rejects: Rejects
    """Bad rows."""
    repeated: int
    """Training rows that also stand in held-out sources of their own: they flatter the held-out loss."""


def read_split(data: ChatData, seed: int) -> Split:
    """Read every source of a recipe. Raises DataError for a bad row (``on_bad: fail``), or when nothing is left."""
    rejects = Rejects(data.on_bad)
    sources = [(source, _some(source, rejects)) for source in data.train]
    if not any(rows for _, rows in sources):
        raise DataError("no row can be used", where="data.train", hint=rejects.first())
    if isinstance(data.held_out, list):
        held_out = [example for source in data.held_out for example in _some(source, rejects)]
        keys = {said(example) for example in held_out}
        repeated = sum(said(example) in keys for _, rows in sources for example in rows)
    else:
        apart = held_out_keys((row for _, rows in sources for row in rows), data.held_out, seed)
        held_out = [row for _, rows in sources for row in rows if said(row) in apart]
        sources = [(source, [row for row in rows if said(row) not in apart]) for source, rows in sources]
        repeated = 0
    train = [row for n, (source, rows) in enumerate(sources) for row in _weighed(source, rows, mix(seed, 5, n))]
    return Split(tuple(train), tuple(held_out), rejects, repeated)


def _some(source: ChatSource, rejects: Rejects) -> list[Example]:
    """A source's examples; DataError when it has no row, not even a bad one."""
    before = len(rejects.errors)
    found = list(examples(source, rejects))
    if not found and len(rejects.errors) == before:
        raise DataError("there is no row in it", where=shown(source.path))
    return found


def examples(source: ChatSource, on_bad: OnBad) -> Iterator[Example]:
    """A source's examples in order. ``format: auto`` is told from the first row that has a known layout."""
    layout: str | None = None if source.format == "auto" else source.format
    which = source.path, source.config, source.split, source.revision
    for record in read_records(*which, on_bad=on_bad):
        for row in _unfolded(record, on_bad):
            try:
                layout = layout or tell(row)
                found = parse(row, layout)
            except DataError as error:
                on_bad(error)
            else:
                yield found


def _unfolded(record: Record, on_bad: OnBad) -> Iterator[Record]:
    try:
        yield from unfold(record)
    except DataError as error:
        on_bad(error)


def said(example: Example) -> str:
    """A key for what an example says, wherever it stands."""
    if isinstance(example, Chat):
        said = [part for m in example.messages for part in (m.role, m.reasoning, m.content)]
        called = [part for m in example.messages for part in (m.calls, m.answers) if part]
        return content_key(*said, *called, *filter(None, [example.messages[0].tools]))
    return content_key("", example.prompt, example.completion)


def held_out_keys(rows: Iterable[Example], share: float, seed: int) -> set[str]:
    """The contents set aside: the ``share`` of all different ones (at least one) that a keyed hash ranks first.

    Equal rows go to the same side. Raises DataError when that leaves nothing to train on.
    """
    keys = {said(row) for row in rows}
    if share == 0:
        return set()
    count = max(1, round(share * len(keys)))
    if count >= len(keys):
        what, hint = ("rows", "a lower share, or 0") if len(keys) > 1 else ("row", "0 sets none aside")
        reason = f"a share of {share:g} of {len(keys)} different {what} leaves none to train on"
        raise DataError(reason, where="data.held_out", hint=hint)
    return set(sorted(keys, key=lambda key: content_key(seed, key))[:count])


def _weighed(source: ChatSource, rows: Sequence[Example], seed: int) -> list[Example]:
    """``weighted``; DataError when a weight leaves none of a source's rows."""
    found = weighted(rows, source.weight, seed)
    if rows and not found:
        raise DataError(f"a weight of {source.weight:g} leaves none of its {len(rows)} rows", where=shown(source.path))
    return found


def weighted(rows: Sequence[Example], weight: float, seed: int) -> list[Example]:
    """``rows`` taken ``weight`` times: all of them for each whole part, and for the rest a fixed share by the seed."""
    whole, rest = divmod(weight, 1)
    chosen = np.random.Generator(np.random.PCG64(seed)).permutation(len(rows))[: round(rest * len(rows))]
    return [*rows] * int(whole) + [rows[i] for i in sorted(chosen)]

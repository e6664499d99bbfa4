"""The files of a merged model, tensor for tensor: the base's own, a single file as a folder, or a folder as a file."""

from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch

from lorakit.adapters.formats import long
from lorakit.adapters.merging.base import Home, OpenBase, Packed
from lorakit.adapters.merging.change import Change
from lorakit.adapters.merging.source import FLOATS, Slot, Source
from lorakit.adapters.merging.stream import OutFile, Span, Target
from lorakit.adapters.merging.turned import Turned, turned
from lorakit.errors import ModelError
from lorakit.storage import checks

Changes = dict[Home, Change]


def _converted(slot: Slot, dtype: torch.dtype | None) -> Slot:
    return slot._replace(dtype=dtype) if dtype is not None and slot.dtype in FLOATS else slot


def same_layout(base: OpenBase, changes: Changes, dtype: torch.dtype | None) -> dict[str, OutFile]:
    """The base's own files, tensor for tensor."""
    changed: dict[tuple[str, str], list[Home]] = {}
    for home in changes:
        changed.setdefault((home.file, home.name), []).append(home)
    found = {home._replace(turned=False): turned(c) if home.turned else c for home, c in changes.items()}
    used = {(home.file, home.name) for homes in base.homes.values() for home in homes.values()}

    def spans(file: str, name: str, rows: int) -> Iterator[Span]:
        homes = changed.get((file, name), [])
        cuts = sorted({0, rows, *(row for home in homes for row in (home.first, home.last))})
        for first, last in list(pairwise(cuts)) or [(0, 0)]:
            change = found.get(Home(file, name, first, last))
            yield Span(base.sources[file], name, first, last, change, (file, name) in used)

    return {
        file: OutFile(
            {
                name: Target(_converted(slot, dtype), tuple(spans(file, name, slot.rows)))
                for name, slot in source.slots.items()
            },
            source.metadata,
        )
        for file, source in base.sources.items()
    }


def unpacked(base: OpenBase, changes: Changes, dtype: torch.dtype | None) -> dict[str, OutFile]:
    """A single file's components as a diffusers folder's files."""
    files = {}
    for component, model in base.models.items():
        tensors = {}
        for name, tensor in model.state_dict().items():
            home = base.homes[component][name]
            source = base.sources[home.file]
            slot = _converted(Slot(source.slots[home.name].dtype, tuple(tensor.shape)), dtype)
            # Versions of transformers before 5.6 would fill CLIP at random without the long names.
            tensors[long(component, name)] = Target(slot, (_span(source, home, changes.get(home), turn=home.turned),))
        files[f"{component}/{checks.WEIGHTS[component]}.safetensors"] = OutFile(tensors, {"format": "pt"})
    return files


def _span(source: Source, home: Home, change: Change | None, *, turn: bool) -> Span:
    """All of a component's tensor, with ``turn`` its transpose."""
    if not turn:
        return Span(source, home.name, home.first, home.last, change)
    seen = Turned(source)
    return Span(seen, home.name, 0, seen.slots[home.name].rows, change)


def packed_up(
    base: OpenBase,
    names: Mapping[str, Packed],
    metadata: dict[str, str],
    changes: Changes,
    dtype: torch.dtype | None,
) -> OutFile:
    """A folder's components as one file in the original names."""
    tensors = {}
    for key, packed in names.items():
        spans, slot = [], Slot(torch.float32, packed.shape)
        for component, name in packed.parts:
            home = base.home(component, name)
            if home is None:
                raise ModelError(f"{component} has no such tensor", where=name)
            source, change = base.sources[home.file], changes.get(home)
            slot = slot._replace(dtype=source.slots[home.name].dtype)
            if change is not None and packed.turned:
                change = turned(change)
            spans.append(_span(source, home, change, turn=packed.turned))
        tensors[key] = Target(_converted(slot, dtype), tuple(spans))
    return OutFile(tensors, metadata)

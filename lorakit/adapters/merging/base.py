"""A base as a merge sees it: where each tensor of each component is, and what comes along with the weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from lorakit.adapters.formats import bare
from lorakit.adapters.merging.carry import copy_rest
from lorakit.adapters.merging.source import FileSource, Source, Told
from lorakit.errors import ModelError
from lorakit.storage import checks
from lorakit.storage.bases import BaseLocation
from lorakit.storage.configs import FOUR_BIT


class Home(NamedTuple):
    """Where a component's tensor is in the base: rows of a file's tensor, or with ``turned`` the whole transposed."""

    file: str
    name: str
    first: int
    last: int
    turned: bool = False


class Packed(NamedTuple):
    """What a tensor of a single file is made of."""

    parts: tuple[tuple[str, str], ...]
    """(component, tensor) pairs, stacked by rows; none for a tensor that says something by being there."""
    shape: tuple[int, ...]
    """In the file."""
    turned: bool = False
    """It is the transpose of its one part."""


@dataclass(frozen=True)
class Original:
    """A single-file checkpoint, as the family that knows its names sees it."""

    models: Mapping[str, nn.Module]
    """The components on the meta device."""
    names: Mapping[str, Packed]
    """By tensor in the file; those that belong to no component are left out."""
    write_rest: Callable[[Path], None]
    """Writes a diffusers folder's files beside the weights."""


@dataclass(frozen=True)
class OpenBase:
    """A base's headers."""

    models: Mapping[str, nn.Module]
    """The components on the meta device."""
    sources: Mapping[str, Source]
    """By path inside the folder, or the file's name."""
    homes: dict[str, dict[str, Home]]
    """By component and the model's own tensor name."""
    write_rest: Callable[[Path, Mapping[str, Any]], None]
    """Writes what comes along into a folder, with these changes to the model's config."""
    packed: tuple[Mapping[str, Packed], dict[str, str]] | None = None
    """For a folder that becomes a single file: its tensors by original name, and its metadata."""
    four_bit: bool = False
    """Its linear layers are stored in bitsandbytes' 4 bits, which ``sources`` dequantize."""

    def read_through(self, sources: Mapping[str, Source]) -> "OpenBase":
        """The same base with some of its files read through these."""
        return replace(self, sources={**self.sources, **sources})

    def told(self, go_on: Callable[[int], None]) -> "OpenBase":
        """The same base, which tells ``go_on`` how many bytes of it are read."""
        return self.read_through({name: Told(source, go_on) for name, source in self.sources.items()})

    def home(self, component: str, name: str) -> Home | None:
        own = self.homes.get(component, {})
        return own.get(name) or own.get(bare(name))


def open_folder(base: BaseLocation, models: Mapping[str, nn.Module]) -> OpenBase:
    """The headers of a folder, whose components are ``models``. Raises ModelError for a damaged state of 4 bits."""
    stems = {"model": "model"} if base.layout == "transformers" else checks.weight_stems(base.path)
    sources: dict[str, Source] = {}
    files: dict[str, list[str]] = {}
    for component, stem in stems.items():
        folder = "" if base.layout == "transformers" else f"{component}/"
        paths = checks.shard_files(base.path / folder, stem)
        sources |= {folder + path.name: FileSource(path) for path in paths}
        files[component] = [folder + path.name for path in paths]
    names = [name for source in sources.values() for name in source.slots]
    four_bit = base.layout == "transformers" and any(FOUR_BIT in name for name in names)
    if four_bit:
        from lorakit.adapters.merging.four_bit import dequantized  # bitsandbytes takes seconds to import

        sources = dequantized(sources)
    homes = {
        component: {
            bare(name): Home(file, name, 0, slot.rows) for file in own for name, slot in sources[file].slots.items()
        }
        for component, own in files.items()
    }
    return OpenBase(models, sources, homes, lambda out, config: copy_rest(base, out, config), four_bit=four_bit)


def open_single(base: BaseLocation, original: Original) -> OpenBase:
    """The headers of a single file. Raises ModelError when a component lacks a tensor or has one too many."""
    file, source = base.path.name, FileSource(base.path)
    rows = {
        component: {name: tensor.shape[0] if tensor.dim() else 1 for name, tensor in model.state_dict().items()}
        for component, model in original.models.items()
    }
    homes: dict[str, dict[str, Home]] = {component: {} for component in rows}
    for key, packed in original.names.items():
        place = 0
        for component, name in packed.parts:
            size = rows[component].get(name, 0) if len(packed.parts) > 1 else source.slots[key].rows
            homes[component][name] = Home(file, key, place, place + size, packed.turned)
            place += size
    for component, names in rows.items():
        for name in names.keys() ^ homes[component].keys():
            reason = "is missing" if name in names else "is left over"
            raise ModelError(f"{component}'s {name} {reason}", where=str(base.path))
    return OpenBase(original.models, {file: source}, homes, lambda out, _: original.write_rest(out))

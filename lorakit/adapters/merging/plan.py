"""What a merge would write, worked out from headers: every tensor of every file, and what changes it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from lorakit.adapters.delta import Delta, SavedAdapter, told_as
from lorakit.adapters.files import assemble
from lorakit.adapters.merging.base import Home, OpenBase
from lorakit.adapters.merging.change import Change, Rows, Term, Whole, not_alone
from lorakit.adapters.merging.layout import Changes, packed_up, same_layout, unpacked
from lorakit.adapters.merging.source import FLOATS, FileSource, check_finite
from lorakit.adapters.merging.stream import OutFile
from lorakit.adapters.merging.tied import equal_terms, tied_by_config, tied_names, untied, with_tied
from lorakit.adapters.pieces import CONFIG, TEMPLATE, TEMPLATE_KEY, Piece, open_pieces, trained_template
from lorakit.adapters.vocabulary import take_vocabulary
from lorakit.adapters.whole import EMBEDDINGS, added_biases
from lorakit.errors import ConflictError, ModelError, RecipeError
from lorakit.storage.bases import BaseLocation

QuantBase = Literal["original", "as-trained"]


@dataclass(frozen=True)
class Settings:
    """How to merge."""

    dtype: torch.dtype | None = None
    """float32, float16 or bfloat16 for all floats; without it each tensor keeps its own, and GGUF becomes float16."""
    quant_base: QuantBase = "original"
    """For an adapter trained over 4-bit weights: add to the base's own weights, or to what training saw of them."""


class PlannedAdapter(NamedTuple):
    """One adapter of a merge."""

    path: Path
    weight: float
    pieces: tuple[Piece, ...]
    """Its weight files, opened."""
    files: tuple[Path, ...]
    format: str
    ranks: tuple[int, ...]
    """Those that occur, sorted."""
    trained_on: str
    """The base's name and SHA-256 as lorakit records them; empty when the file does not say."""


@dataclass(frozen=True)
class MergePlan:
    """All that a merge will do."""

    base: BaseLocation
    adapters: tuple[PlannedAdapter, ...]
    out: Path
    settings: Settings
    files: dict[str, OutFile]
    """By path inside ``out``; the one key ``""`` when ``out`` is a file itself."""
    changed: int
    """Tensors that the adapters change."""
    untied: bool
    """The head shared the embedding's weight and gets one of its own."""
    template: str | None
    """The chat template that the adapters were trained with."""
    write_rest: Callable[[Path], None]
    """Writes into a folder what comes along with the weights."""

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return sum(file.size for file in self.files.values())

    @property
    def dtypes(self) -> list[str]:
        """Of the floats that are written, sorted."""
        found = {target.slot.dtype for file in self.files.values() for target in file.tensors.values()}
        return sorted(str(dtype).removeprefix("torch.") for dtype in found & FLOATS)


def plan_merge(
    base: BaseLocation,
    opened: OpenBase,
    adapters: Sequence[tuple[Path, float]],
    out: Path,
    settings: Settings = Settings(),
) -> MergePlan:
    """Map every tensor of the adapters, each taken ``weight`` times, to rows of one tensor of the base.

    ``opened`` are the base's headers, or those of the folder that a GGUF base unpacks to. ``out`` is a folder, or with
    a name that ends in ``.safetensors`` a single file, when the base is one or ``opened.packed`` tells its names.

    Raises ModelError when the base lacks a tensor or an adapter does not fit, ConflictError for a single file from a
    base that is none, RecipeError for the original weights of a base that is stored in 4 bits.
    """
    if opened.four_bit and settings.quant_base == "original":
        reason, hint = f"{base.name} has 4-bit weights alone", "give the original weights as BASE"
        raise RecipeError(reason, where="--quant-base original", hint=hint)
    single = out.suffix == ".safetensors"
    if single and base.layout != "single-file" and opened.packed is None:
        raise ConflictError("only a Stable Diffusion becomes a single file", where=str(out), hint="name a folder")
    dtype = settings.dtype or (torch.float16 if base.layout == "gguf" else None)
    _check_complete(opened)
    found: dict[tuple[str, str], list[Term]] = {}
    planned = tuple(_read(path, weight, opened, found) for path, weight in adapters)
    if settings.quant_base == "as-trained":
        from lorakit.adapters.merging.nf4 import as_trained  # bitsandbytes takes seconds to import

        opened = opened.read_through(as_trained(opened))
    tied = tied_names(opened)
    changes, head = _changes(opened, found, tied)
    if base.layout == "single-file" and not single:
        files = unpacked(opened, changes, dtype)
    elif opened.packed is not None:
        files = {"": packed_up(opened, *opened.packed, changes, dtype)}
    else:
        files = same_layout(opened, changes, dtype)
        if head is not None and tied is not None:
            files = untied(files, opened, tied, head)
    config: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    config |= {} if head is None else {"tie_word_embeddings": False}
    template = trained_template(piece.metadata for adapter in planned for piece in adapter.pieces)

    def write_rest(folder: Path) -> None:
        opened.write_rest(folder, config)
        if base.family == "llama":
            take_vocabulary([adapter.path for adapter in planned], folder)
        if template is not None:
            (folder / TEMPLATE).write_text(template, encoding="utf-8")

    return MergePlan(
        base=base,
        adapters=planned,
        out=out,
        settings=settings,
        files={"": files[base.path.name]} if single and opened.packed is None else files,
        changed=len(changes) + (head is not None and bool(head.terms)),
        untied=head is not None,
        template=template,
        write_rest=write_rest,
    )


def _check_complete(base: OpenBase) -> None:
    """ModelError naming a tensor of a component that is in no file, but for a tied head."""
    tied = tied_by_config(base.models)
    for component, model in base.models.items():
        for name in model.state_dict():
            if base.home(component, name) is None and (tied is None or name != tied[0]):
                where = told_as(component, name)
                raise ModelError(
                    "the base lacks it, and its config demands it", where=where, hint="get the whole model again"
                )


def _read(path: Path, weight: float, base: OpenBase, found: dict[tuple[str, str], list[Term]]) -> PlannedAdapter:
    """Add an adapter's terms to ``found``, by component and tensor name.

    ModelError where a number is not finite, or with ``weight`` no float32, and where DoRA meets another adapter's.
    """
    pieces = tuple(open_pieces(path))
    saved = assemble(path, pieces, base.models, whole=True)
    scales = [1.0, *(abs(delta.scale) for delta in saved.all_deltas().values())]
    if abs(weight) * max(scales) > torch.finfo(torch.float32).max:
        raise ModelError(f"taken {weight:g} times, its change is more than float32 holds", where=str(path))
    own: dict[tuple[str, str], list[Term]] = {}
    for (component, module), delta in saved.all_deltas().items():
        own[component, f"{module}.weight"] = [(delta, weight)]
    for piece in pieces:
        source = FileSource(piece.path) if piece.whole else None
        for name, key in piece.whole.items():
            assert source is not None
            check_finite(source, key, f"{piece.path}: {key}")
            own.setdefault((piece.component, name), []).append((Whole(source, key), weight))
        for name, what in _beside(piece, saved, base).items():
            own.setdefault((piece.component, name), []).append((what, weight))
    for place, terms in own.items():
        together = found.setdefault(place, [])
        if together and any(isinstance(what, Delta) and what.magnitude is not None for what, _ in (*together, *terms)):
            raise not_alone()
        together += terms
    beside = [CONFIG, *([TEMPLATE] if TEMPLATE_KEY in saved.metadata else [])]
    files = [file for piece in pieces for file in (piece.path, *map(piece.path.with_name, beside)) if file.is_file()]
    if not path.is_dir():
        files = [path]
    ranks = tuple(sorted({delta.rank for delta in saved.all_deltas().values()}))
    trained_on = saved.metadata.get("lorakit_base", "")
    return PlannedAdapter(path, weight, pieces, tuple(files), saved.format, ranks, trained_on)


def _beside(piece: Piece, saved: SavedAdapter, base: OpenBase) -> dict[str, Delta | Rows]:
    """What biases of B and single tokens change, by tensor name."""
    found: dict[str, Delta | Rows] = {}
    for name, added in added_biases(piece.biases, saved.components.get(piece.component, {})).items():
        if base.home(piece.component, name) is None:
            reason = "the adapter adds a bias (lora_bias), and the base's layer has none that it could be added to"
            raise ModelError(reason, where=f"{piece.path}: {name}")
        found[name] = added
    tied = tied_by_config(base.models)
    head, embedding = tied or ("", "")
    for module, tokens in piece.tokens.items():
        name = f"{module}.weight"
        home = base.home(piece.component, name) or (base.home(piece.component, embedding) if name == head else None)
        if home is None:
            raise ModelError("the base has no such tensor", where=f"{piece.path}: {module}")
        height = home.last - home.first
        if not len(tokens.indices) or int(tokens.indices.max()) >= height:
            raise ModelError(f"trained tokens that the base does not have: it has {height}", where=module)
        rows = Rows(tokens.indices, tokens.values, height)
        found |= dict.fromkeys(with_tied(name, piece.tokens, tied), rows)
    return found


def _changes(
    base: OpenBase, found: Mapping[tuple[str, str], list[Term]], tied: tuple[str, str] | None
) -> tuple[Changes, Change | None]:
    """What all adapters do together by place, and to a head that shared the embedding's weight and no longer can."""
    changes: Changes = {}
    head: Change | None = None
    terms = dict(found)
    if tied is not None:
        name, embedding = ("model", tied[0]), ("model", tied[1])
        if not equal_terms(terms.get(name, []), terms.get(embedding, [])):
            head = Change(terms.pop(name, []))
            _check(head, base, "model", tied[1], f"{tied[0]} (tied)")
        elif base.home("model", tied[0]) is None:
            terms.pop(name, None)
    for (component, tensor), together in terms.items():
        change = Change(together)
        changes[_check(change, base, component, tensor, tensor)] = change
    return changes, head


def _check(change: Change, base: OpenBase, component: str, name: str, told: str) -> Home:
    """Where the tensor ``name`` is; ModelError when it is nowhere, takes no change, or has another shape."""
    home = base.home(component, name)
    if home is None:
        raise ModelError("the base has no such tensor of its own", where=told)
    slot = base.sources[home.file].slots[home.name]
    if slot.dtype not in FLOATS:
        raise ModelError(f"the base's tensor is {slot.dtype}: nothing can be added to it", where=told)
    expected = (slot.columns, slot.rows) if home.turned else (home.last - home.first, slot.columns)
    for shape in change.shapes - {expected}:
        reason = f"the adapter's has {shape}, the base's {expected} rows and columns"
        grown = shape[0] > expected[0] and shape[1] == expected[1]
        hint = f"its vocabulary has grown: transformers' resize_token_embeddings({shape[0]}) makes a base for it"
        raise ModelError(reason, where=told, hint=hint if grown and name.split(".")[-2] in EMBEDDINGS else "")
    return home

"""Adapters on the command line, and the base that their module names are held against. No weights are read."""

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import ModelError, RecipeError

if TYPE_CHECKING:
    from torch import nn

    from lorakit.adapters.delta import SavedAdapter
    from lorakit.adapters.formats import Format
    from lorakit.adapters.merging.base import OpenBase
    from lorakit.adapters.pieces import Piece
    from lorakit.data.images import Size
    from lorakit.numerics.diffusion import PredictionType
    from lorakit.storage.bases import BaseLocation

LOG = logging.getLogger("lorakit")


@dataclass(frozen=True)
class AdapterBase:
    """The base's components on the meta device, and what else is known of it."""

    name: str
    models: "dict[str, nn.Module]"
    predicts: "PredictionType | None" = None
    """Of a Stable Diffusion that is at hand."""
    size: "Size | None" = None
    """Width and height in pixels that such a one was trained at."""
    guess: str = ""
    """Of a base that is not at hand, what is said of it."""


def parse_adapter(text: str) -> tuple[Path, float]:
    """``PATH`` or ``PATH:WEIGHT``; RecipeError when there is nothing at the path."""
    path, weight = Path(text), 1.0
    head, colon, tail = text.rpartition(":")
    if colon and not os.path.exists(path):  # Path.exists raises where a name is too long
        try:
            path, weight = Path(head), float(tail)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise RecipeError(f"{tail!r} is not a weight", where=text, hint="PATH:0.8, say")
    if not os.path.exists(path):
        raise RecipeError(
            "there is no such adapter", where=str(path), hint="give a run folder, a PEFT folder or a file"
        )
    return path, weight


def named_base(pieces: "Sequence[Piece]") -> str:
    """The base that an adapter's metadata name, as it was named in training; empty when they name none."""
    from lorakit.storage.bases import split_base_id

    for piece in pieces:
        config = piece.component_config(piece.component) or {}
        for text in (config.get("base_model_name_or_path"), piece.metadata.get("lorakit_base")):
            if text:
                return split_base_id(str(text))[0]
    return ""


_MODEL = "general.base_model.0."
_WORDS = (
    ("ss_sd_model_name",), (f"{_MODEL}repo_url",), (f"{_MODEL}organization", f"{_MODEL}name"), (f"{_MODEL}name",),
    ("ss_base_model_version",), ("modelspec.architecture",),
)  # fmt: skip
"""Keys of sd-scripts, llama.cpp's converter and modelspec for what an adapter was made for, the most exact first."""


def made_for(pieces: "Sequence[Piece]") -> str:
    """``named_base``, else what other programs' metadata say of the base: a file, an address, a name or a kind."""
    if name := named_base(pieces):
        return name
    told = {key: text.removesuffix("/lora") for piece in pieces for key, text in piece.metadata.items()}
    known = {key for key, text in told.items() if text not in ("", "None")}
    return next((" ".join(told[key] for key in keys) for keys in _WORDS if known.issuperset(keys)), "")


def find_base(pieces: "Sequence[Piece]", given: str | None, *, compared: "Sequence[Piece]" = ()) -> AdapterBase | None:
    """``given``, else the built-in base that the metadata name, else a published Stable Diffusion of the adapter's
    widths, else None. A path or hub id that the metadata name is never opened by itself. ``compared`` is
    ``open_base``'s.
    """
    from lorakit.adapters.known import SPELLED, known_models, recognise
    from lorakit.storage.bases import resolve

    if given is not None:
        return open_base(resolve(given), compared)
    name = named_base(pieces)
    if name.startswith("builtin:"):
        return open_base(resolve(name), compared)
    version = next((found for piece in pieces if (found := recognise(piece.tensors))), None)
    if version is None:
        return None
    told = f"no base is given: {SPELLED[version]} is taken by the width of the text; name another with --base"
    return AdapterBase(name, known_models(version), guess=told)


def read_for(
    adapter: Path, pieces: "Sequence[Piece]", given: str | None, *forms: "Format"
) -> "tuple[SavedAdapter, AdapterBase | None]":
    """An adapter that is read from and written to ``forms``, and ``find_base`` for it. A guessed base that it does not
    fit counts for none.

    Raises: ModelError where one of them spells its names by the base's layers and no base is found.
    """
    from lorakit.adapters.files import assemble

    found = find_base(pieces, given, compared=pieces)
    form = next((form for form in forms if form in ("kohya", "gguf")), None)
    if found is None and form is not None:
        name, words = named_base(pieces), made_for(pieces)
        told = f"name it with --base; the adapter tells of {words}" if words else "name it with --base"
        told = f"--base {name}, if you trust what the adapter names" if name else told
        reason = f"the names in a {form} file go by the layers of the base it was made for"
        raise ModelError(reason, where=str(pieces[0].path), hint=told)
    try:
        models = None if found is None else found.models
        saved = assemble(adapter, pieces, models, embeddings=forms[-1] in ("peft", "gguf"))
    except ModelError as error:
        if found is None or not found.guess:
            raise
        if form is not None:
            raise ModelError(error.reason, where=error.where, hint=found.guess) from error
        return assemble(adapter, pieces, None), None
    if found is not None and found.guess and form is not None:
        LOG.warning("%s: %s", adapter, found.guess)
    return saved, found


def open_headers(location: "BaseLocation") -> "OpenBase":
    """The headers of a whole model of any layout; a GGUF file is unpacked first."""
    if location.family == "sd":
        from lorakit.families.sd.original import open_stable_diffusion

        return open_stable_diffusion(location)
    import torch

    from lorakit.families.llama.base import as_folder
    from lorakit.families.llama.skeleton import open_language_model

    return open_language_model(as_folder(location, torch.float32))


def open_base(location: "BaseLocation", pieces: "Sequence[Piece]" = ()) -> AdapterBase:
    """``model``, or ``unet``, ``text_encoder`` and, of SDXL, ``text_encoder_2``; of ``model`` those weights that
    ``pieces`` hold whole are there, to be compared."""
    import torch

    if location.family == "sd":
        from lorakit.families.sd.skeleton import skeleton

        bones = skeleton(location, torch.float32)
        predicts = bones.schedule.get("prediction_type", "epsilon")  # diffusers' own default
        return AdapterBase(location.name, bones.adaptable, predicts, bones.size)
    from lorakit.families.llama.base import as_folder
    from lorakit.families.llama.skeleton import open_language_model

    opened = open_language_model(as_folder(location, torch.float16))
    return AdapterBase(location.name, dict(with_weights(opened, pieces)))


def with_weights(base: "OpenBase", pieces: "Iterable[Piece]") -> "Mapping[str, nn.Module]":
    """The models of a base on meta, with its own weights where ``pieces`` hold such whole."""
    from torch import nn

    from lorakit.adapters.merging.tied import tied_by_config

    tied = tied_by_config(base.models) or ("", "")
    for name in {name for piece in pieces for name in piece.whole}:
        home = base.home("model", name) or (base.home("model", tied[1]) if name == tied[0] else None)
        module, _, kind = name.rpartition(".")
        if home is not None:
            rows = base.sources[home.file].rows(home.name, home.first, home.last)
            layer = base.models["model"].get_submodule(module)
            shape = base.sources[home.file].slots[home.name].shape
            setattr(layer, kind, nn.Parameter(rows.reshape(shape), requires_grad=False))
    return base.models

"""Adapters put on a model in memory without merging: what a merged model is compared with."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lorakit.adapters.delta import Delta, SavedAdapter, product
from lorakit.adapters.files import assemble
from lorakit.adapters.inject import apply
from lorakit.adapters.pieces import Piece, open_pieces
from lorakit.adapters.source import FileSource
from lorakit.adapters.tied import tied_names
from lorakit.adapters.whole import Tokens, added_biases


def put_on(models: Mapping[str, nn.Module], adapters: Sequence[tuple[Path, float]]) -> None:
    """Put all of each adapter into a base's components, ``weight`` times: LoRA beside layers and embeddings as it was
    trained, and whole modules, single tokens and biases in place of the base's. ModelError when one does not fit.
    """
    originals: dict[tuple[str, str], Tensor] = {}
    for number, (path, weight) in enumerate(adapters):
        pieces = open_pieces(path)
        saved = assemble(path, pieces, models, whole=True)
        for piece in pieces:
            _replace(models, piece, saved, weight, originals)
        for component, deltas in saved.components.items():
            embeddings = {name: module for name, module in models[component].named_modules() if name in deltas}
            embeddings = {name: module for name, module in embeddings.items() if isinstance(module, nn.Embedding)}
            for name, module in embeddings.items():
                module.register_forward_hook(_looked_up(deltas[name], weight))
            layers = {name: delta for name, delta in deltas.items() if name not in embeddings}
            if layers:
                apply(models[component], layers, weight=weight, name=f"adapter{number}")


def _replace(
    models: Mapping[str, nn.Module],
    piece: Piece,
    saved: SavedAdapter,
    weight: float,
    originals: dict[tuple[str, str], Tensor],
) -> None:
    """W + weight (S - W), with the same W for every adapter; a weight that two modules shared is shared no longer."""

    def add(name: str, difference: Callable[[Tensor], Tensor]) -> None:
        path, _, kind = name.rpartition(".")
        module: Any = models[piece.component].get_submodule(path)
        owner = module.get_base_layer() if isinstance(module, LoraLayer) else module
        before = getattr(owner, kind).detach()
        original = originals.setdefault((piece.component, name), before)
        after = before + weight * difference(original).to(before.dtype)
        setattr(owner, kind, nn.Parameter(after, requires_grad=False))

    source = FileSource(piece.path) if piece.whole else None
    for name, key in piece.whole.items():
        assert source is not None
        add(name, partial(_whole, source, key))
    tied = tied_names(models)
    for module, tokens in piece.tokens.items():
        for name in {f"{module}.weight", *(tied if tied and f"{module}.weight" == tied[1] else ())}:
            add(name, partial(_rows, tokens))
    for name, added in added_biases(piece.biases, saved.components.get(piece.component, {})).items():
        add(name, partial(_bias, added))


def _whole(source: FileSource, key: str, original: Tensor) -> Tensor:
    """The difference that a module trained whole makes."""
    whole = source.rows(key, 0, source.slots[key].rows)
    return whole.view(original.shape).to(original.dtype) - original


def _rows(tokens: Tokens, original: Tensor) -> Tensor:
    """The difference that single rows make."""
    rows = tokens.values.to(original.dtype) - original[tokens.indices]
    return torch.zeros_like(original).index_copy(0, tokens.indices, rows)


def _bias(added: Delta, original: Tensor) -> Tensor:
    """The difference that a bias of B makes."""
    return product(added).view(original.shape)


def _looked_up(delta: Delta, weight: float) -> Any:
    """A hook that adds an embedding's LoRA to what it looks up: rows of B times A."""

    def hook(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        rows = nn.functional.embedding(inputs[0], delta.B.float())
        added: Tensor = rows @ delta.A.float() * (weight * delta.scale)
        return output + added.to(output.dtype)

    return hook


def difference(reference: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Root mean square of found - reference as a share of the reference's own spread around its mean."""
    one, other = (torch.cat([tensor.flatten().double() for tensor in tensors]) for tensors in (reference, found))
    return float((other - one).square().mean().sqrt() / one.std().clamp_min(1e-300))

"""What is in an adapter's files, sound or not: ranks, alphas and norms by block, dead modules, broken tensors."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lorakit.adapters import formats
from lorakit.adapters.delta import Delta, told_as
from lorakit.adapters.files import check_config, common_alpha, made_for_another, read_delta, shaped_by
from lorakit.adapters.gguf_lora import named_by_base
from lorakit.adapters.outline import adaptable
from lorakit.adapters.pieces import Piece
from lorakit.adapters.targets import compare
from lorakit.errors import ModelError

_BLOCK = re.compile(
    r"((?:.*?\.)?layers\.\d+|(?:down|up)_blocks\.\d+|mid_block|blk\.\d+"
    r"|lora_unet_(?:down_blocks|up_blocks|input_blocks|output_blocks)_\d+|lora_unet_mid(?:dle)?_block"
    r"|lora_te\d?_text_model_encoder_layers_\d+)"
)


@dataclass(frozen=True)
class Block:
    """The modules of one block of a component."""

    name: str
    modules: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    """Where none is given, the rank, which is what readers take."""
    norm: float
    """Frobenius norm of scale * B A over all its modules."""


@dataclass(frozen=True)
class Description:
    """An adapter as it stands in its files."""

    path: str
    format: str
    family: str
    """``sd`` or ``llama``."""
    kind: str
    """``LoRA``, ``rsLoRA`` or ``DoRA``."""
    bytes: int
    """Of the weight files."""
    dtypes: tuple[str, ...]
    """Of the tensors as they are read, but for alphas."""
    modules: int
    parameters: int
    norm: float
    """Frobenius norm of all changes together."""
    blocks: tuple[Block, ...]
    dead: tuple[str, ...]
    """Modules whose B is all zeros: they change nothing."""
    faults: tuple[str, ...]
    """Tensors with NaN or infinity, and why a module makes no change that a model could take."""
    beside: tuple[str, ...]
    """What is not LoRA of a layer's weight: whole tensors, tokens, biases, embeddings. A merge takes all of it in."""
    metadata: dict[str, str]
    """The files' own strings."""


@dataclass(frozen=True)
class _Module:
    """A module that makes a change, its alpha (None where the file gives none), and where it is."""

    delta: Delta
    alpha: float | None
    component: str
    path: str

    def squared_norm(self) -> float:
        """|scale * B A|^2 by the products A A^T and B^T B, [r, r] each."""
        a, b = (matrix.double().flatten(1) for matrix in (self.delta.A, self.delta.B))
        return self.delta.scale**2 * float(((a @ a.T) * (b.T @ b)).sum())


def describe(path: Path, pieces: Sequence[Piece], models: Mapping[str, nn.Module] | None) -> Description:
    """``models``: the base's components, on meta if need be; without them kohya's modules go by their flat names.

    What does not make a change is among the faults.
    """
    whole: dict[str, _Module] = {}
    faults: list[str] = []
    broken = 0
    for piece in pieces:
        found, wrong = _modules(piece, models)
        whole |= found
        broken += len(wrong)
        if piece.format == "peft":
            try:
                check_config(piece.config)
            except ModelError as error:
                faults.append(str(error))
        faults += [f"{key}: NaN or infinity" for key, t in piece.tensors.items() if not torch.isfinite(t).all()]
        faults += [f"{error.where}: {error.reason}" for error in wrong]
    groups: dict[str, list[_Module]] = {}
    for name, module in whole.items():
        groups.setdefault(_block(name), []).append(module)
    blocks = tuple(_summary(name, group) for name, group in groups.items())
    tensors = [piece.tensors[name] for piece in pieces for name, key in piece.keys.items() if key.part != "alpha"]
    learned = [matrix for m in whole.values() for matrix in (m.delta.A, m.delta.B, m.delta.magnitude)]
    return Description(
        path=str(path),
        format=pieces[0].format,
        family="llama" if any(key.component == "model" for key in pieces[0].keys.values()) else "sd",
        kind=_kind(pieces, whole),
        bytes=sum(piece.path.stat().st_size for piece in pieces),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
        modules=len(whole) + broken,
        parameters=sum(matrix.numel() for matrix in learned if matrix is not None),
        norm=sum(block.norm**2 for block in blocks) ** 0.5,
        blocks=blocks,
        dead=tuple(name for name, module in whole.items() if _dead(module.delta)),
        faults=tuple(faults),
        beside=tuple(name for piece in pieces for name in piece.beside),
        metadata={key: text for piece in pieces for key, text in piece.metadata.items()},
    )


def unfit(pieces: Sequence[Piece], models: Mapping[str, nn.Module]) -> list[str]:
    """Every module that the base with these components has not, or in another shape."""
    wrong = []
    for piece in pieces:
        modules, _ = _modules(piece, models)
        for component in dict.fromkeys(module.component for module in modules.values()):
            own = {name: module for name, module in modules.items() if module.component == component}
            if component not in models:
                wrong.append(f"{len(own)} modules: {made_for_another(component)}")
                continue
            names = {module.path: name for name, module in own.items()}
            changes = {module.path: module.delta for module in own.values()}
            try:
                if piece.format == "gguf":
                    changes = named_by_base(changes, models[component], piece.metadata["general.architecture"])
            except ModelError as error:
                wrong.append(str(error))
                continue
            _, reasons = compare(models[component], shaped_by(models[component], changes))
            wrong += [f"{names.get(path, path)}: {reason}" for path, reason in reasons.items()]
    return wrong


def _dead(delta: Delta) -> bool:
    """Whether scale * B A is zero by a factor."""
    return not (delta.scale and delta.A.any() and delta.B.any())


def _modules(piece: Piece, models: Mapping[str, nn.Module] | None) -> tuple[dict[str, _Module], list[ModelError]]:
    """The modules that make a change, by name, and what is wrong with the others."""
    table = {}
    if piece.format == "kohya" and models is not None:
        table = formats.kohya_table({name: list(adaptable(model)) for name, model in models.items()})
    twice: dict[str, ModelError] = {}
    modules: dict[tuple[str, str, str], dict[formats.Part, str]] = {}
    for key, (component, module, part) in piece.keys.items():
        component, path = table.get(module, (component, module))
        own = piece.format == "gguf" or (module not in table and piece.format == "kohya")
        name = path if own else told_as(component, path)
        first = modules.setdefault((name, component, path), {}).setdefault(part, key)
        if first != key:
            twice.setdefault(name, ModelError(f"says the same as {first}", where=key))
    found, wrong, common = {}, [], common_alpha(piece)
    for (name, component, path), parts in modules.items():
        config = piece.component_config(component)
        try:
            if name in twice:
                raise twice[name]
            delta = read_delta(path, parts, piece, config)
            given = config is not None or "alpha" in parts or common is not None
            root = config is not None and config.get("use_rslora")
            alpha = delta.scale * (delta.rank**0.5 if root else delta.rank)
            rounded = float(f"{alpha:.9g}") if given else None  # a root and back is not exact
            found[name] = _Module(delta, rounded, component, path)
        except ModelError as error:
            wrong.append(error)
    return found, wrong


def _block(name: str) -> str:
    component, _, path = name.partition(".")
    if component in ("unet", "text_encoder", "text_encoder_2"):
        match = _BLOCK.match(path)
        return f"{component}.{match[1] if match else path.split('.')[0]}"
    match = _BLOCK.match(name)
    return match[1] if match else name


def _summary(name: str, group: Sequence[_Module]) -> Block:
    return Block(
        name,
        len(group),
        tuple(sorted({module.delta.rank for module in group})),
        tuple(sorted({float(module.delta.rank) if module.alpha is None else module.alpha for module in group})),
        sum(module.squared_norm() for module in group) ** 0.5,
    )


def _kind(pieces: Sequence[Piece], modules: Mapping[str, _Module]) -> str:
    if any(module.delta.magnitude is not None for module in modules.values()):
        return "DoRA"
    configs = [piece.component_config(key.component) or {} for piece in pieces for key in piece.keys.values()]
    return "rsLoRA" if any(config.get("use_rslora") for config in configs) else "LoRA"

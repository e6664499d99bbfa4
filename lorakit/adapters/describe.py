"""What is in an adapter's files, sound or not: ranks, alphas and norms by block, dead modules, broken tensors."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakit.adapters import formats, gguf_lora
from lorakit.adapters.files import configured
from lorakit.adapters.outline import adaptable
from lorakit.adapters.pieces import Piece

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
    modules: int
    parameters: int
    norm: float
    """Frobenius norm of all changes together."""
    blocks: tuple[Block, ...]
    dead: tuple[str, ...]
    """Modules whose B is all zeros: they change nothing."""
    faults: tuple[str, ...]
    """Tensors with NaN or infinity, modules of which a part is missing."""
    metadata: dict[str, str]
    """The files' own strings."""


class _Module:
    """The tensors of one module, by part."""

    def __init__(self) -> None:
        self.parts: dict[formats.Part, Tensor] = {}
        self.alpha: float | None = None
        self.scale: float | None = None

    @property
    def rank(self) -> int:
        return self.parts["A"].shape[0]

    def squared_norm(self) -> float:
        """|scale * B A|^2 by the products A A^T and B^T B, [r, r] each."""
        a, b = (self.parts[part].double().flatten(1) for part in ("A", "B"))
        scale = 1.0 if self.scale is None else self.scale
        return scale**2 * float(((a @ a.T) * (b.T @ b)).sum())


def describe(path: Path, pieces: Sequence[Piece], models: Mapping[str, nn.Module] | None) -> Description:
    """``models``: the base's components, on meta if need be; without them kohya's modules go by their flat names.

    Raises ModelError for a configuration that is not LoRA's.
    """
    modules: dict[str, _Module] = {}
    faults: list[str] = []
    for piece in pieces:
        for name, module in _modules(piece, models).items():
            modules[name] = module
        faults += [f"{key}: NaN or infinity" for key, t in piece.tensors.items() if not torch.isfinite(t).all()]
    faults += [f"{name}: its {part} is missing" for name, m in modules.items() for part in "AB" if part not in m.parts]
    whole = {name: module for name, module in modules.items() if {"A", "B"} <= module.parts.keys()}
    groups: dict[str, list[_Module]] = {}
    for name, module in whole.items():
        groups.setdefault(_block(name), []).append(module)
    blocks = tuple(_summary(name, group) for name, group in groups.items())
    tensors = [tensor for piece in pieces for tensor in piece.tensors.values()]
    learned = [m.parts[part] for m in whole.values() for part in ("A", "B", "magnitude") if part in m.parts]
    return Description(
        path=str(path),
        format=pieces[0].format,
        family="llama" if any(key.component == "model" for key in pieces[0].keys.values()) else "sd",
        kind=_kind(pieces, whole),
        bytes=sum(piece.path.stat().st_size for piece in pieces),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
        modules=len(modules),
        parameters=sum(tensor.numel() for tensor in learned),
        norm=sum(block.norm**2 for block in blocks) ** 0.5,
        blocks=blocks,
        dead=tuple(name for name, module in whole.items() if not module.parts["B"].any()),
        faults=tuple(faults),
        metadata={key: text for piece in pieces for key, text in piece.metadata.items()},
    )


def _modules(piece: Piece, models: Mapping[str, nn.Module] | None) -> dict[str, _Module]:
    table = {}
    if piece.format == "kohya" and models is not None:
        table = formats.kohya_table({name: list(adaptable(model)) for name, model in models.items()})
    found: dict[str, _Module] = {}
    for key, (component, module, part) in piece.keys.items():
        component, path = table.get(module, (component, module))
        own = piece.format == "gguf" or (module not in table and piece.format == "kohya")
        entry = found.setdefault(path if own or component == "model" else f"{component}.{path}", _Module())
        entry.parts[part] = piece.tensors[key]
        config = piece.component_config(component)
        if config is not None and part == "A":
            entry.alpha, entry.scale = configured(config, path, piece.tensors[key].shape[0])
    for entry in found.values():
        if "alpha" in entry.parts:
            entry.alpha = float(entry.parts["alpha"].flatten()[0])
        elif piece.format == "gguf":
            entry.alpha = float(piece.metadata.get(gguf_lora.ALPHA, 0)) or None
        if entry.scale is None and entry.alpha is not None and "A" in entry.parts:
            entry.scale = entry.alpha / entry.rank
    return found


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
        tuple(sorted({module.rank for module in group})),
        tuple(sorted({float(module.rank) if module.alpha is None else module.alpha for module in group})),
        sum(module.squared_norm() for module in group) ** 0.5,
    )


def _kind(pieces: Sequence[Piece], modules: Mapping[str, _Module]) -> str:
    if any("magnitude" in module.parts for module in modules.values()):
        return "DoRA"
    return "rsLoRA" if any(piece.config.get("use_rslora") for piece in pieces) else "LoRA"

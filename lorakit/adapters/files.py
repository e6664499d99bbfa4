"""Adapters on disk: PEFT folders, kohya, diffusers and GGUF files, read into one form.

A tensor that is left over, missing, misshapen or not finite is an error that names it, and a base that an adapter's
configuration names is never loaded for it.
"""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lorakit.adapters import formats, gguf_lora
from lorakit.adapters.delta import Delta, SavedAdapter
from lorakit.adapters.outline import adaptable
from lorakit.adapters.patterns import LARGEST, number, targeted
from lorakit.adapters.pieces import CONFIG, Piece, located, open_pieces
from lorakit.adapters.targets import fit
from lorakit.errors import ModelError

__all__ = ["assemble", "check_config", "common_alpha", "made_for_another", "read_adapter", "read_delta", "shaped_by"]

LOG = logging.getLogger("lorakit")
PEFT_ALPHA = 8
"""What PEFT's LoraConfig takes where a file names none."""
_NOT_SUPPORTED = (
    "layer_replication", "target_parameters", "megatron_config", "alora_invocation_tokens", "use_qalora",
    "arrow_config", "kasa_config", "use_bdlora",
)  # fmt: skip
"""Fields of a PEFT configuration that change what the tensors mean. (fan_in_fan_out is not one: PEFT itself
resets it for every layer but GPT-2's.)"""


_MOVED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that take something off the base's weights before training starts: B A is no change of the base that
people have."""


def read_adapter(
    path: Path, models: Mapping[str, nn.Module] | None = None, *, embeddings: bool = False
) -> SavedAdapter:
    """An adapter from a PEFT folder (or a run folder with one), a kohya, diffusers or GGUF file.

    ``models`` are the base's components by name (``model``; ``unet``, ``text_encoder``, ``text_encoder_2``), on meta if
    need be. With them every module and shape is compared, and paths are the models' own; the flat names of kohya and
    the names of GGUF need them.

    With ``embeddings`` and ``models``, LoRA of an embedding [V, D] is among the changes, as that of a layer with such a
    weight.

    Raises ModelError naming the file and the key.
    """
    return assemble(path, open_pieces(path), models, embeddings=embeddings)


def assemble(
    path: Path,
    pieces: Sequence[Piece],
    models: Mapping[str, nn.Module] | None,
    *,
    embeddings: bool = False,
    whole: bool = False,
) -> SavedAdapter:
    """``read_adapter`` for what ``open_pieces`` found at ``path``.

    Only a merge takes in what is not LoRA of a layer's weight: with ``whole`` the caller sees to the tensors that the
    pieces hold whole, to biases and tokens, and LoRA of an embedding is among the changes; without it they are a
    ModelError, but for ``embeddings`` and for PEFT's copies of weights that the base has.
    """
    try:
        for piece in [] if whole else pieces:
            for name in piece.beside:
                if not (embeddings and models and name in piece.embeddings):
                    _check_copy(piece, name, models or {})
        saved = _joined([_read(piece, models) for piece in pieces])
        if models is None:
            return saved
        fitted = _fitted(saved, models)
        for piece in [piece for piece in pieces if piece.format == "peft"]:
            _check_targets(piece.config, models[piece.component], fitted.components[piece.component])
        return fitted
    except ModelError as error:
        raise located(error, path) from error


def _check_copy(piece: Piece, name: str, models: Mapping[str, nn.Module]) -> None:
    """ModelError for what is not LoRA of a layer's weight, unless it is the base's own tensor, as PEFT saves it with
    LoRA of a head or with the embeddings, in the dtype that training had it in. A base on meta tells only what
    ``with_weights`` gave it."""
    wanted, key, (path, _, kind) = "not LoRA of a layer's weight", piece.whole.get(name), name.rpartition(".")
    if not models and (key is not None or name in piece.embeddings):
        reason = "LoRA of an embedding" if key is None else "the base's own, or a changed one"
        raise ModelError(f"{reason}: only the base can tell", where=name, hint="give it with --base")
    modules = models[piece.component].named_modules() if piece.component in models else ()
    own = getattr({at.removesuffix(".base_layer"): module for at, module in modules}.get(path), kind, None)
    if key is not None and own is not None and not own.is_meta:
        with safe_open(piece.path, "pt") as file:
            copy = file.get_tensor(key)
        if torch.equal(own.cpu(), copy.to(own.dtype)) or torch.equal(own.cpu().to(copy.dtype), copy):
            return
        wanted = f"not the base's {kind}"
    raise ModelError(f"{wanted}: only a merge can take it in", where=name, hint="lorakit merge BASE ADAPTER OUT")


def _joined(parts: list[SavedAdapter]) -> SavedAdapter:
    components: dict[str, dict[str, Delta]] = {}
    metadata: dict[str, str] = {}
    for part in parts:
        components |= part.components
        metadata |= part.metadata
    return SavedAdapter(parts[0].family, components, parts[0].format, metadata)


def _read(piece: Piece, models: Mapping[str, nn.Module] | None) -> SavedAdapter:
    tokens = {module: rows.values for module, rows in piece.tokens.items()}
    for key, tensor in {**piece.tensors, **piece.biases, **tokens}.items():
        if not torch.isfinite(tensor).all():
            raise ModelError("NaN or infinity", where=key)
    keys, metadata = piece.keys, dict(piece.metadata)
    if piece.format in ("kohya", "gguf") and models is None:
        raise ModelError(f"the names in a {piece.format} file can only be read against a base")
    if piece.format == "kohya" and models is not None:
        if "unet" not in models:
            raise ModelError("made for a Stable Diffusion model, which the base is not")
        table = formats.kohya_table({name: adaptable(model) for name, model in models.items()})
        keys = {key: part._replace(module=formats.flat_path(part.module, table)) for key, part in keys.items()}
    if piece.format == "peft":
        check_config(piece.config)
        metadata["base_model_name_or_path"] = str(piece.config.get("base_model_name_or_path") or "")
    components = {}
    for component in dict.fromkeys(part.component for part in keys.values()):
        own = {key: part for key, part in keys.items() if part.component == component}
        config = piece.component_config(component)
        if config is not None and "lora_alpha" not in config:
            LOG.warning("%s: no lora_alpha; PEFT's own %d is taken", piece.path, PEFT_ALPHA)
            config = {**config, "lora_alpha": PEFT_ALPHA}
        deltas = _deltas(own, piece, config)
        model = None if models is None else models.get(component)
        if piece.format == "gguf" and model is not None:
            deltas = gguf_lora.named_by_base(deltas, model, metadata["general.architecture"])
        components[component] = deltas
        alphas = sum(part.part == "alpha" for part in own.values())
        if config is None and common_alpha(piece) is None and alphas < len(deltas):
            told = "%s: no alpha for %d modules of %s; alpha = rank is taken"
            LOG.warning(told, piece.path, len(deltas) - alphas, component)
    return SavedAdapter("llama" if "model" in components else "sd", components, piece.format, metadata)


def common_alpha(piece: Piece) -> float | None:
    """GGUF's one alpha; llama.cpp takes 0 for none."""
    return float(piece.metadata.get(gguf_lora.ALPHA, 0)) or None if piece.format == "gguf" else None


def check_config(config: Mapping[str, Any]) -> None:
    """ModelError for a PEFT configuration under which the tensors are no LoRA of the base's own weights."""
    if config.get("peft_type") != "LORA":
        raise ModelError(f"peft_type is {config.get('peft_type')!r}, not LORA", where=CONFIG)
    for key in _NOT_SUPPORTED:
        if config.get(key):
            raise ModelError(f"{key} is not supported", where=CONFIG)
    if (start := str(config.get("init_lora_weights"))).lower().startswith(_MOVED_BASES):
        reason = f"init_lora_weights is {start!r}: its base was changed before training, so B A is not its change"
        hint = "save it again with PEFT's path_initial_model_for_weight_conversion"
        raise ModelError(reason, where=CONFIG, hint=hint)


def _deltas(keys: Mapping[str, formats.Key], piece: Piece, config: Mapping[str, Any] | None) -> dict[str, Delta]:
    """A component's changes, of those ``keys`` of ``piece``. The scale comes from PEFT's ``config``, else from alpha
    tensors, else from GGUF's one alpha for all modules; without any of these alpha = rank."""
    modules: dict[str, dict[formats.Part, str]] = {}
    for key, part in keys.items():
        if part.part in modules.setdefault(part.module, {}):
            raise ModelError(f"says the same as {modules[part.module][part.part]}", where=key)
        modules[part.module][part.part] = key
    return {module: read_delta(module, parts, piece, config) for module, parts in modules.items()}


def read_delta(
    module: str,
    parts: Mapping[formats.Part, str],
    piece: Piece,
    config: Mapping[str, Any] | None,
) -> Delta:
    """One module's change from the keys of its ``parts`` in ``piece``; ``config`` is its component's.

    Raises ModelError naming the key, for whatever does not make a change.
    """
    tensors, alpha, place = piece.tensors, common_alpha(piece), piece.config_place
    a, b = _matrices(module, parts, tensors)
    rank, scale = a.shape[0], 1.0
    if config is not None:
        if number(config, "r", module, place) != rank:
            raise ModelError(f"rank {rank}, but the configuration says otherwise", where=parts["A"])
        scale = number(config, "lora_alpha", module, place) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    elif "alpha" in parts:
        scale = _alpha(parts["alpha"], tensors) / rank
    elif alpha is not None:
        scale = alpha / rank
    if "magnitude" not in parts and config is not None and config.get("use_dora"):
        raise ModelError("its DoRA magnitude is missing", where=parts["A"])
    return Delta(a, b, scale, _magnitude(parts["magnitude"], tensors, b) if "magnitude" in parts else None)


def _matrices(module: str, parts: Mapping[formats.Part, str], tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    for part, other in (("A", "B"), ("B", "A")):
        if part not in parts:
            raise ModelError(f"its {part} is missing", where=parts.get(other, module))  # type: ignore[call-overload]
    a, b = tensors[parts["A"]], tensors[parts["B"]]
    if "core" in parts:
        a = _with_core(a, tensors[parts["core"]], parts["core"])
    rank = a.shape[0] if a.dim() else 0
    if a.dim() not in (2, 4) or b.dim() not in (2, 4) or b.shape[1] != rank or b.shape[2:].numel() != 1:
        raise ModelError(f"A {tuple(a.shape)} and B {tuple(b.shape)} do not multiply", where=parts["A"])
    if not 0 < rank <= max(a[0].numel(), b.shape[0]):  # PEFT and others give all layers one rank, narrow ones too
        reason = f"rank {rank} is more than the layer's inputs and outputs: A {tuple(a.shape)}, B {tuple(b.shape)}"
        raise ModelError(reason, where=parts["A"])
    return a, b


def _with_core(a: Tensor, core: Tensor, key: str) -> Tensor:
    """LyCORIS' Tucker form of a convolution, A [r, in, 1, 1] and a core [r, r, kh, kw], as one A [r, in, kh, kw], in no
    less than float32."""
    if core.dim() != 4 or a.dim() != 4 or core.shape[:2] != (len(a), len(a)) or a.shape[2:].numel() != 1:
        raise ModelError(f"A {tuple(a.shape)} and its core {tuple(core.shape)} do not multiply", where=key)
    whole = torch.einsum("rskl,si->rikl", core.double(), a.double().flatten(1))
    return whole.to(torch.promote_types(core.dtype, torch.float32))


def _alpha(key: str, tensors: Mapping[str, Tensor]) -> float:
    alpha = tensors[key]
    if alpha.numel() != 1:
        raise ModelError(f"alpha has shape {tuple(alpha.shape)}", where=key)
    if abs(alpha.item()) >= LARGEST:
        raise ModelError(f"alpha is {alpha.item():g}", where=key)
    return alpha.item()


def _magnitude(key: str, tensors: Mapping[str, Tensor], b: Tensor) -> Tensor:
    magnitude = tensors[key]
    pefts = "lora_magnitude_vector" in key  # of a convolution [1, out, 1, 1]; LyCORIS' dora_scale then is [1, in, 1, 1]
    outer = magnitude.shape[1:2] if pefts and magnitude.dim() == 4 and magnitude.shape[0] == 1 else magnitude.shape[:1]
    if magnitude.numel() != b.shape[0] or outer != b.shape[:1]:
        reason = f"magnitudes {tuple(magnitude.shape)} for {b.shape[0]} outputs: only DoRA on the output is supported"
        raise ModelError(reason, where=key)
    return magnitude.flatten()


def _check_targets(config: Mapping[str, Any], model: nn.Module, found: Collection[str]) -> None:
    """A layer that PEFT's configuration targets but the file has no tensors for is an error; PEFT saves one that it
    trains whole in ``modules_to_save``."""
    targets, whole = config.get("target_modules"), tuple(config.get("modules_to_save") or ())
    if not targets or config.get("exclude_modules") or config.get("layers_to_transform") not in (None, []):
        return
    for name in [name for name in adaptable(model) if name not in found]:
        if targeted(targets, name, CONFIG) and not name.endswith(whole):
            raise ModelError("the configuration targets it, the weights do not have it", where=name)


def _fitted(saved: SavedAdapter, models: Mapping[str, nn.Module]) -> SavedAdapter:
    """The same with the models' own paths, and 1x1 convolutions and linear layers told apart by the model."""
    components = {}
    for component, deltas in saved.components.items():
        if component not in models:
            raise ModelError(made_for_another(component))
        shaped = shaped_by(models[component], deltas)
        paths = fit(models[component], shaped)
        components[component] = {paths[path]: delta for path, delta in shaped.items()}
    return SavedAdapter(saved.family, components, saved.format, saved.metadata)


def made_for_another(component: str) -> str:
    """What is said of an adapter with a component that the base has not."""
    kind = {"model": "a language model"}.get(component, f"a model with a {component}")
    return f"made for {kind}, which the base is not"


def shaped_by(model: nn.Module, deltas: Mapping[str, Delta]) -> dict[str, Delta]:
    """The changes of 1x1 convolutions and of linear layers in the one shape or the other, as the model has them."""
    named = {formats.bare(name): layer for name, layer in adaptable(model).items()}
    shaped = {}
    for path, delta in deltas.items():
        layer, a, b = named.get(formats.bare(path)), delta.A, delta.B
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and a.dim() == 2:
            a, b = a[:, :, None, None], b.reshape(*b.shape[:2], 1, 1)
        elif isinstance(layer, nn.Linear) and a.dim() == 4 and a.shape[2:] == (1, 1):
            a, b = a.flatten(1), b.flatten(1)
        shaped[path] = Delta(a, b, delta.scale, delta.magnitude)
    return shaped

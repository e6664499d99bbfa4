"""The files of an adapter opened: tensors, and what their names and configuration say, before any base is known.

Only safetensors, GGUF and JSON are opened, never a pickle.
"""

import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from lorakit.adapters import formats, gguf_lora
from lorakit.adapters.targets import matches
from lorakit.adapters.whole import Tokens, embeddings_as_layers, second_copies, take_biases, take_tokens, whole_tensors
from lorakit.errors import ModelError
from lorakit.storage.bases import file_digest, split_base_id
from lorakit.storage.checks import PICKLES, check_link, read_json, read_text
from lorakit.storage.headers import read_header
from lorakit.storage.manifest import check_manifest

LOG = logging.getLogger("lorakit")
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
DIFFUSERS = "pytorch_lora_weights.safetensors"
PACKED = "lora_adapter_metadata"
"""Where a diffusers file's own metadata have its configuration."""
TEMPLATE = "chat_template.jinja"
"""The chat template that an adapter was trained with, as transformers and TRL leave it beside a model."""
TEMPLATE_KEY = "lorakit_chat_template"
"""The same among the metadata."""
CHECKPOINT, STATE = "adapter.safetensors", "state.json"
"""Of a checkpoint's folder (``training.checkpoint``)."""
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_UNETS = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "conv_out.", "time_embedding.", "add_embedding.")
_CLIPS = ("text_model.encoder.", "encoder.layers.")
_UNPICKLE = "convert it to safetensors"
_SECOND_WIDTH = 1280
"""Of SDXL's second text encoder."""
_FLOATS = {"F64", "F32", "F16", "BF16"}
_EIGHT = {"F8_E4M3", "F8_E5M2"}
"""Floats of 8 bits, all of which are numbers of float16 too."""
_WHOLE = {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"}
"""What else alphas may be: diffusers' converter to kohya's format writes whole ones."""


@dataclass(frozen=True)
class Piece:
    """One weight file of an adapter."""

    path: Path
    format: formats.Format
    tensors: dict[str, Tensor]
    keys: dict[str, formats.Key]
    """What each tensor is."""
    metadata: dict[str, str]
    """The file's own strings, and the chat template beside it."""
    config: dict[str, Any]
    """PEFT's adapter_config.json, or diffusers' ``lora_adapter_metadata`` with its prefixes; else empty."""
    whole: dict[str, str] = field(default_factory=dict)
    """The base's tensors that the file replaces, by name, and their keys; they are not in ``tensors``."""
    embeddings: tuple[str, ...] = ()
    """Modules among ``keys`` that are embeddings."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    """Of B, [out] by module."""
    tokens: dict[str, Tokens] = field(default_factory=dict)
    """Single rows of an embedding or head, by module."""

    @property
    def beside(self) -> tuple[str, ...]:
        """Tensors and modules that are not LoRA of a layer's weight; a merge takes all of them in."""
        return (*self.whole, *self.embeddings, *self.tokens, *(f"{module}'s bias of B" for module in self.biases))

    @property
    def component(self) -> str:
        """Of its first tensor; a PEFT file has only one."""
        return next(iter(self.keys.values())).component

    @property
    def config_place(self) -> str:
        """Where ``config`` stands."""
        return CONFIG if self.format == "peft" else PACKED

    def component_config(self, component: str) -> dict[str, Any] | None:
        """The PEFT configuration of one component; None where the file has none."""
        if self.format == "peft":
            return self.config
        prefix = f"{component}."
        if any(key.startswith(prefix) for key in self.keys):
            return {k.removeprefix(prefix): v for k, v in self.config.items() if k.startswith(prefix)} or None
        return {k: v for k, v in self.config.items() if "." not in k} or None  # a UNet's that was saved alone


def trained_template(adapters: Iterable[Mapping[str, str]]) -> str | None:
    """The chat template that adapters, given by their metadata, were trained with; of several the first, with a
    warning."""
    found = list(dict.fromkeys(metadata[TEMPLATE_KEY] for metadata in adapters if TEMPLATE_KEY in metadata))
    if len(found) > 1:
        LOG.warning("the adapters were trained with %d different chat templates: the first one's is taken", len(found))
    return found[0] if found else None


def open_pieces(path: Path) -> list[Piece]:
    """The weight files of a PEFT folder, a run's folder or a checkpoint's, or the one of the other formats.

    Raises CheckpointError for a damaged checkpoint, and ModelError naming the file and the key: no adapter, several
    formats in one, a tensor that is no part of LoRA.
    """
    try:
        if path.name == CHECKPOINT and (path.parent / STATE).is_file():  # whose names diffusers' format has too
            raise ModelError("one file of a checkpoint, without its alpha", hint=f"give the folder: {path.parent}")
        return _open_folder(path) if path.is_dir() else [_open_file(path)]
    except ModelError as error:
        raise located(error, path) from error


def identity(adapter: Path, weight: float) -> dict[str, Any]:
    """An adapter as it is written down with what it made: its name, its weight, and so much of a SHA-256 over its
    weight files as tells it from others of its name."""
    digests = b"".join(file_digest(piece.path) for piece in open_pieces(adapter))
    return {"name": adapter.name, "weight": weight, "sha256": hashlib.sha256(digests).hexdigest()[:16]}


def located(error: ModelError, path: Path) -> ModelError:
    """The same error with the adapter's path in front of its place."""
    inside = error.where if error.where.startswith(str(path)) else f"{path}: {error.where}".removesuffix(": ")
    return ModelError(error.reason, where=inside, hint=error.hint)


def peft_folder(path: Path) -> Path | None:
    """Where PEFT's files are, of a PEFT folder or a run's; None of anything else."""
    folder = _inside(path)
    return folder if (folder / CONFIG).is_file() else None


def _inside(path: Path) -> Path:
    """A run's folder has its adapter in one of its own."""
    return path / "adapter" if not (path / CONFIG).is_file() and (path / "adapter").is_dir() else path


def _open_folder(path: Path) -> list[Piece]:
    path = _inside(path)
    if (path / STATE).is_file():
        return _open_checkpoint(path)
    if (path / DIFFUSERS).is_file():
        return [_open_file(path / DIFFUSERS)]
    parts = {name: path / name for name in COMPONENTS if (path / name).is_dir()} or {_component(path): path}
    return [_open_peft(component, folder) for component, folder in parts.items()]


def _component(folder: Path) -> str:
    """What a single PEFT folder is for, by its names: PEFT knows nothing of a model's place in a pipeline. SDXL's text
    encoders have the same ones, and are told apart by the folder's name or by the published one's width."""
    if not (folder / WEIGHTS).is_file():
        return "model"
    tensors = read_header(folder / WEIGHTS).tensors
    shapes = {name.removeprefix("base_model.model."): info.shape for name, info in tensors.items()}
    if any(name.startswith(_UNETS) for name in shapes):
        return "unet"
    if not any(name.startswith(_CLIPS) for name in shapes):
        return "model"
    wide = any(".self_attn." in name and _SECOND_WIDTH in shape for name, shape in shapes.items())
    return "text_encoder_2" if wide or folder.resolve().name == "text_encoder_2" else "text_encoder"


def _open_checkpoint(folder: Path) -> list[Piece]:
    """The adapter as it was in the middle of a run: tensors under the model's names, all else in the run's recipe.

    Raises CheckpointError for a checkpoint that its manifest does not vouch for.
    """
    check_manifest(folder)
    try:
        state = read_json(folder / STATE)
        recipe, base_id, section = state["recipe"], str(state["base_id"]), state["recipe"]["adapter"]
        rank, patterns = section["rank"], section["alpha_pattern"].items()
        alpha = rank if section["alpha"] is None else section["alpha"]
        flags = {"use_rslora": section["rslora"], "use_dora": section["dora"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError("no recipe of an adapter", where=str(folder / STATE)) from error
    run, base_name = folder.parent.parent.name, split_base_id(base_id)[0]
    metadata = {"lorakit_name": run, "lorakit_base": base_id, "lorakit_recipe": json.dumps(recipe)}
    tensors, _ = _tensors(folder / CHECKPOINT)
    components: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        first, _, rest = key.partition(".")
        component, name = (first, rest) if first in COMPONENTS else ("model", key)
        components.setdefault(component, {})[f"base_model.model.{name}"] = tensor
    pieces = []
    for component, own in components.items():
        keys = {key: formats.split(key, "peft", component) for key in own}
        ranks, alphas = {}, {}
        for key, part in keys.items():
            if part.part == "A":
                name = f"^{re.escape(part.module)}$"
                ranks[name] = len(own[key])
                alphas[name] = next((value for p, value in patterns if matches(part.module, p)), alpha)
        config: dict[str, Any] = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, **flags}
        config["rank_pattern"] = {name: value for name, value in ranks.items() if value != rank}
        config["alpha_pattern"] = {name: value for name, value in alphas.items() if value != alpha}
        config["base_model_name_or_path"] = base_name
        pieces.append(Piece(folder / CHECKPOINT, "peft", own, keys, dict(metadata), config))
    return pieces


def _open_peft(component: str, folder: Path) -> Piece:
    if not (folder / CONFIG).is_file():
        inside = [str(config.parent) for config in sorted(folder.glob(f"*/{CONFIG}"))]
        hint = f"give {' or '.join(inside)}" if inside else ""
        raise ModelError(f"no {CONFIG}: not an adapter's folder", where=str(folder), hint=hint)
    if not (folder / WEIGHTS).is_file():
        pickles = [file.name for file in folder.iterdir() if file.suffix in PICKLES]
        reason = f"only {pickles[0]}, a pickle, which is never opened" if pickles else f"no {WEIGHTS}"
        raise ModelError(reason, where=str(folder), hint=_UNPICKLE if pickles else "")
    config = read_json(folder / CONFIG)
    names = read_header(folder / WEIGHTS).tensors
    whole = whole_tensors(names, config)
    tensors, metadata = _tensors(folder / WEIGHTS, {*whole.values(), *second_copies(names, whole)})
    if component == "model" and (folder / TEMPLATE).is_file():
        check_link(folder / TEMPLATE, folder)
        metadata[TEMPLATE_KEY] = read_text(folder / TEMPLATE)
    biases, tokens = take_biases(tensors, config), take_tokens(tensors, config)
    tensors, embeddings = embeddings_as_layers(tensors)
    if (form := formats.detect(tensors)) != "peft":
        raise ModelError(f"{form} keys in a PEFT folder", where=str(folder / WEIGHTS))
    keys = {key: formats.split(key, "peft", component) for key in tensors}
    return Piece(folder / WEIGHTS, "peft", tensors, keys, metadata, config, whole, embeddings, biases, tokens)


def _open_file(path: Path) -> Piece:
    if path.suffix in PICKLES:
        raise ModelError("a pickle, which is never opened", hint=_UNPICKLE)
    tensors, metadata = gguf_lora.read(path) if path.suffix == ".gguf" else _tensors(path)
    form = formats.detect(tensors)
    if form == "peft":
        raise ModelError("PEFT's weights without their adapter_config.json", hint="give the folder that holds both")
    keys = {key: formats.split(key, form) for key in tensors}
    embeddings = {key.module for key in keys.values()} & {gguf_lora.EMBEDDING}
    return Piece(path, form, tensors, keys, metadata, _packed_config(metadata), embeddings=tuple(embeddings))


def _packed_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        config = json.loads(metadata.get(PACKED, "{}"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"not readable as JSON: {error}", where=PACKED) from error
    if not isinstance(config, dict):
        raise ModelError("not a JSON object", where=PACKED)
    return config


def _tensors(path: Path, without: Collection[str] = ()) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a checked file, those of 8 bits as float16 and whole alphas as float64, and its metadata;
    ModelError for another dtype."""
    header = read_header(path)
    formats.refuse_other_kinds(header.tensors)
    tensors = {}
    with safe_open(path, framework="pt") as file:
        for name, info in header.tensors.items():
            if name in without:
                continue
            if info.dtype not in _FLOATS | _EIGHT and not (info.dtype in _WHOLE and name.endswith(".alpha")):
                hint = "float8, float16, bfloat16, float32 and float64 are read"
                raise ModelError(f"its numbers are {info.dtype}", where=name, hint=hint)
            tensor = file.get_tensor(name)
            if info.dtype not in _FLOATS:
                tensor = tensor.half() if info.dtype in _EIGHT else tensor.double()
            tensors[name] = tensor
    return tensors, header.metadata

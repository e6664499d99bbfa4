"""YAML text -> a tree of nodes that know their place. YAML 1.2, scalars left as text, no tags, bounded in every way.

Built on ruamel.yaml's event stream and not on its constructor: nothing in a file can name a Python object, and depth
and size are known before anything is walked.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError

from lorakit.errors import RecipeError, shown

MAX_BYTES = 1 << 20
MAX_DEPTH = 50
MAX_NODES = 20_000
MAX_KEY = 200
MAX_TOLD = 50
"""Faults that are told; the others are counted."""
HINT = "`lorakit init sd` or `lorakit init llama` writes a recipe with every key explained"


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a recipe: ``where`` is FILE:LINE:COL FIELD, or ``--set FIELD``."""

    where: str
    reason: str


@dataclass
class Node:
    """A value and its place. ``where`` is FILE:LINE:COL, or ``--set``."""

    where: str
    size: int = field(default=1, kw_only=True)
    """Values in here, aliases counted as often as they are used."""
    depth: int = field(default=1, kw_only=True)


@dataclass
class Scalar(Node):
    text: str
    plain: bool
    """Written without quotes, so that ``null`` and ``~`` mean nothing is given."""

    @property
    def is_null(self) -> bool:
        return self.plain and self.text in ("", "~", "null", "Null", "NULL")


@dataclass
class Sequence(Node):
    items: list[Node] = field(default_factory=list)


@dataclass
class Mapping(Node):
    items: dict[str, Node] = field(default_factory=dict)
    key_where: dict[str, str] = field(default_factory=dict)
    """Where each key stands."""


def escape(text: str, limit: int = 80) -> str:
    """``text`` fit for one line of a terminal: control characters escaped, cut after ``limit`` characters."""
    return shown(text[:limit]) + ("…" if len(text) > limit else "")


def raise_faults(faults: list[Fault], hint: str = HINT) -> None:
    """Raise every fault as one RecipeError, a line each; nothing when there is none."""
    if len(faults) == 1:
        raise RecipeError(faults[0].reason, where=faults[0].where, hint=hint)
    if faults:
        lines = [f"{fault.where}: {fault.reason}" for fault in faults[:MAX_TOLD]]
        lines += ["…"] if len(faults) > MAX_TOLD else []
        raise RecipeError(f"{len(faults)} faults in the recipe", hint=hint, details=lines)


def read(path: Path) -> str:
    """The text of a recipe file: a regular file of UTF-8, at most 1 MiB, without NUL. Raises RecipeError."""
    where = escape(str(path), 300)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise RecipeError("is not a file", where=where)
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise RecipeError(f"cannot be read: {reason}", where=where, hint=HINT) from error
    if len(raw) > MAX_BYTES:
        raise RecipeError("is larger than 1 MiB; a recipe holds settings, its data stand in other files", where=where)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise RecipeError("is not UTF-8; save it as UTF-8", where=f"{where}:{line}:{column}") from error
    if "\0" in text:
        before = text[: text.index("\0")]
        column = len(before) - before.rfind("\n")
        raise RecipeError("a NUL character", where=f"{where}:{before.count(chr(10)) + 1}:{column}")
    return text


def compose(text: str, source: str, faults: list[Fault]) -> Node | None:
    """The tree of ``text``, or None when it is empty.

    ``source`` is the file's name; an ``--set`` source is given as ``--set`` and gets no line. Duplicate keys and tags
    are added to ``faults``; what leaves no tree (syntax, depth, aliases without end) raises RecipeError.
    """
    return _Composer(text, source, faults).root()


class _Composer:
    def __init__(self, text: str, source: str, faults: list[Fault]) -> None:
        self.source = source
        self.faults = faults
        self.anchors: dict[str, Node | None] = {}
        self.events: Iterator[Any] = self._parse(text)

    def _place(self, mark: Any) -> str:
        return self.source if self.source == "--set" else f"{self.source}:{mark.line + 1}:{mark.column + 1}"

    def _parse(self, text: str) -> Iterator[Any]:
        try:
            yield from YAML(typ="safe", pure=True).parse(text)
        except ReaderError as error:
            before = text[: error.position]
            where = f"{self.source}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
            raise RecipeError(f"not YAML: the character U+{error.character:04X}", where=where) from error
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            problem = escape(error.problem or error.context or "not YAML", 200)
            where = self._place(mark) if mark else self.source
            raise RecipeError(f"not YAML: {problem}", where=where, hint=HINT) from error
        except (YAMLError, ValueError, OverflowError, NotImplementedError) as error:
            lines = str(error).splitlines()
            reason = escape(lines[0], 200) if lines else "a character that YAML does not allow"
            raise RecipeError(f"not YAML: {reason}", where=self.source, hint=HINT) from error

    def root(self) -> Node | None:
        found: Node | None = None
        documents = 0
        for event in self.events:
            match type(event).__name__:
                case "DocumentStartEvent":
                    documents += 1
                    if documents > 1:
                        raise RecipeError("a second document; a recipe is one", where=self._place(event.start_mark))
                case "ScalarEvent" | "SequenceStartEvent" | "MappingStartEvent" | "AliasEvent":
                    found = self._node(event, 1)
        return None if isinstance(found, Scalar) and found.is_null else found

    def _node(self, event: Any, depth: int) -> Node:
        where = self._place(event.start_mark)
        kind = type(event).__name__
        if kind == "AliasEvent":
            known = self.anchors.get(event.anchor)
            if known is None:
                raise RecipeError(f"no finished value is called &{escape(event.anchor)}", where=where, hint=HINT)
            return known
        if depth > MAX_DEPTH:
            raise RecipeError(f"nested deeper than {MAX_DEPTH}", where=where)
        if event.tag is not None:
            self.faults.append(
                Fault(where, f"the tag {escape(str(event.tag))} is refused; a recipe holds plain values")
            )
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        node: Node
        if kind == "ScalarEvent":
            node = Scalar(where, event.value, event.style is None)
        elif kind == "SequenceStartEvent":
            node = self._sequence(where, depth)
        else:
            node = self._mapping(where, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def _grow(self, node: Sequence | Mapping, child: Node) -> None:
        node.size += child.size
        node.depth = max(node.depth, child.depth + 1)
        if node.size > MAX_NODES or node.depth > MAX_DEPTH:
            reason = f"more than {MAX_NODES} values or {MAX_DEPTH} levels, aliases written out"
            raise RecipeError(reason, where=node.where)

    def _sequence(self, where: str, depth: int) -> Sequence:
        node = Sequence(where)
        while type(event := next(self.events)).__name__ != "SequenceEndEvent":
            item = self._node(event, depth + 1)
            node.items.append(item)
            self._grow(node, item)
        return node

    def _mapping(self, where: str, depth: int) -> Mapping:
        node = Mapping(where)
        while type(event := next(self.events)).__name__ != "MappingEndEvent":
            key = self._node(event, depth + 1)
            value = self._node(next(self.events), depth + 1)
            self._grow(node, value)
            if isinstance(value, Scalar) and not value.text and value.plain:
                value = Scalar(key.where, "", True)
            if not isinstance(key, Scalar):
                self.faults.append(Fault(key.where, "a key must be a word"))
            elif len(key.text) > MAX_KEY or not key.text.isprintable():
                self.faults.append(Fault(key.where, f"a key of over {MAX_KEY} or of unprintable characters"))
            elif key.text in node.items:
                first = node.key_where[key.text]
                reason = f"duplicate key {escape(key.text)}, given before at {first}"
                self.faults.append(Fault(f"{key.where} {escape(key.text)}", reason))
            else:
                node.items[key.text] = value
                node.key_where[key.text] = key.where
        return node

"""A tree of nodes -> a recipe, led by the schema's types, so that every fault has its place and its sentence.

A scalar is read as what its field wants: ``1e-4`` is a number in a number's place and text in a text's place; ``no``
is false only where true or false is wanted. Constraints (greater than 0, a name's pattern) stay pydantic's.
"""

import difflib
import math
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from lorakit.recipe.document import MAX_TOLD, Fault, Mapping, Node, Scalar, Sequence, escape
from lorakit.recipe.schema import LlamaRecipe, SDRecipe, Section

INTEGER = re.compile(r"[-+]?[0-9]{1,100}|0x[0-9a-fA-F]{1,80}|0o[0-7]{1,100}")
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.?(nan|inf|infinity)", re.IGNORECASE)
WORDS = {"true": True, "yes": True, "on": True, "y": True, "false": False, "no": False, "off": False, "n": False}
NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
}
R = TypeVar("R", bound=Section)
FAILED = object()
"""Stands for a value whose fault is already noted."""


def section_of(annotation: Any) -> type[Section] | None:
    """The section class that a field's annotation is, if it is one."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def nested_section(annotation: Any) -> type[Section] | None:
    """The section class inside a list annotation, at any depth of unions and ``Annotated``."""
    for inner in get_args(annotation):
        found = section_of(inner) or nested_section(inner)
        if found:
            return found
    return None


def sections(cls: type[Section], prefix: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Every section below ``cls`` with its dotted path; a list's item counts as number 0."""
    for name, field in cls.model_fields.items():
        path = f"{prefix}{name}"
        if inner := section_of(field.annotation):
            yield path, inner
            yield from sections(inner, f"{path}.")
        elif inner := nested_section(field.annotation):
            yield f"{path}.0", inner
            yield from sections(inner, f"{path}.0.")


def describe(annotation: Any) -> str:
    """What an annotation accepts, in words: ``a whole number``, ``adamw or lion_8bit``, ``text or a list``."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return describe(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        members = [describe(member) for member in get_args(annotation) if member is not type(None)]
        return (", or " if " or " in members[0] else " or ").join(members)
    if origin is Literal:
        *rest, last = [str(choice) for choice in get_args(annotation)]
        return f"{', '.join(rest)} or {last}" if rest else last
    if origin is tuple:
        return f"a list of {len(get_args(annotation))} numbers"
    if origin is list:
        return "a list"
    return NAMES.get(annotation, "a section of keys")


def nearest(key: str, names: list[str]) -> str | None:
    """The name most like ``key``, by spelling or by initials (lr, learning_rate); None when none is near."""
    plain = key.strip().lower().replace("-", "_")
    for name in names:
        if "_" in name and "".join(word[:1] for word in name.split("_")) == plain:
            return name
    return next(iter(difflib.get_close_matches(plain[:60], names, 1, 0.6)), None)


def build(kind: type[R], root: Mapping, faults: list[Fault]) -> R | None:
    """The recipe of ``kind`` in ``root``; None when there are faults, which are added to ``faults``."""
    found = _Builder(kind, faults).section(kind, root, "")
    return found if isinstance(found, kind) and not faults else None


def _sentence(error: ErrorDetails, got: str) -> str:
    """pydantic's finding as a plain sentence."""
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    if error["type"] == "string_pattern_mismatch":
        return f"must start with a letter or digit and hold only letters, digits, '.', '_' and '-', at most 100{got}"
    if error["type"] == "too_short":
        return "must not be empty"
    return error["msg"].replace("Input should be", "must be") + got


class _Builder:
    def __init__(self, kind: type[Section], faults: list[Fault]) -> None:
        self.kind = kind
        self.faults = faults

    def fault(self, node: Node, path: str, reason: str) -> object:
        self.faults.append(Fault(f"{node.where} {path}".rstrip(), reason))
        return FAILED

    def section(self, cls: type[Section], node: Node, path: str) -> object:
        """A ``cls`` from a mapping; nothing between its key and the next means all defaults."""
        if isinstance(node, Scalar) and node.is_null:
            node = Mapping(node.where)
        if not isinstance(node, Mapping):
            return self.fault(node, path, "must be a section of keys")
        values: dict[str, object] = {}
        for key, child in node.items.items():
            inner = f"{path}.{key}" if path else key
            if key not in cls.model_fields:
                self.faults.append(Fault(f"{node.key_where[key]} {escape(inner)}", self.unknown(cls, key, path)))
                continue
            values[key] = self.value(cls.model_fields[key].rebuild_annotation(), child, inner)
        for name, field in cls.model_fields.items():
            if field.is_required() and name not in node.items:
                inner = f"{path}.{name}" if path else name
                if below := section_of(field.annotation):
                    values[name] = self.section(below, Mapping(node.where), inner)
                else:
                    values[name] = self.fault(node, inner, f"is missing: {' '.join((field.description or '').split())}")
        if FAILED in values.values():
            return FAILED
        return self.checked(cls, values, node, path)

    def checked(self, annotation: Any, value: object, node: Node, path: str) -> object:
        """``value`` after pydantic's constraints of ``annotation``."""
        try:
            return TypeAdapter(annotation).validate_python(value)
        except ValidationError as errors:
            got = f", not {escape(node.text)}" if isinstance(node, Scalar) else ""
            for error in errors.errors(include_url=False):
                self.fault(node, path, _sentence(error, got))
            return FAILED

    def unknown(self, cls: type[Section], key: str, path: str) -> str:
        """Why ``key`` is no key of ``cls``: it stands in another section, is misspelt, or is of the other family."""
        if len(self.faults) >= MAX_TOLD:
            return "unknown key"
        below = ([("", self.kind)] if path else []) + list(sections(self.kind))
        homes = [home for home, other in below if key in other.model_fields and other is not cls]
        if homes:
            return f"unknown key here; it belongs in {' or '.join(home or 'the top level' for home in homes)}"
        if near := nearest(key, list(cls.model_fields)):
            return f"unknown key; did you mean {near}?"
        for family, kind in (("Stable Diffusion", SDRecipe), ("LLaMA", LlamaRecipe)):
            if any(key in other.model_fields for _, other in sections(kind)):
                return f"unknown key; only a {family} recipe has it"
        return f"unknown key; known here: {', '.join(cls.model_fields)}"

    def value(self, annotation: Any, node: Node, path: str) -> object:
        """What ``annotation`` reads from ``node``, or FAILED after noting why not."""
        origin, arguments = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            found = self.value(arguments[0], node, path)
            return found if found is FAILED else self.checked(annotation, found, node, path)
        if origin in (Union, types.UnionType):
            return self.union(annotation, node, path)
        if section := section_of(annotation):
            return self.section(section, node, path)
        if origin is list and isinstance(node, Sequence):
            return self.several([arguments[0]] * len(node.items), node, path)
        if origin is tuple and isinstance(node, Sequence) and len(node.items) == len(arguments):
            found = self.several(list(arguments), node, path)
            return tuple(found) if isinstance(found, list) else FAILED
        if origin is dict and isinstance(node, Mapping):
            pairs = {key: self.value(arguments[1], child, f"{path}.{key}") for key, child in node.items.items()}
            return FAILED if FAILED in pairs.values() else pairs
        if isinstance(node, Scalar) and not node.is_null and origin not in (list, tuple, dict):
            return self.scalar(annotation, node, path)
        return self.fault(node, path, f"must be {describe(annotation)}, not {_kind(node)}")

    def several(self, annotations: list[Any], node: Sequence, path: str) -> object:
        found = [
            self.value(a, item, f"{path}.{i}") for i, (a, item) in enumerate(zip(annotations, node.items, strict=True))
        ]
        return FAILED if any(item is FAILED for item in found) else found

    def union(self, annotation: Any, node: Node, path: str) -> object:
        """The one member that fits the node: a list's for a list, for a scalar the one whose word it is or any."""
        members = [member for member in get_args(annotation) if member is not type(None)]
        nullable = len(members) < len(get_args(annotation))
        if nullable and isinstance(node, Scalar) and node.is_null:
            return None
        lists = [member for member in members if get_origin(member) in (list, tuple)]
        chosen = lists if isinstance(node, Sequence) else [member for member in members if member not in lists]
        if isinstance(node, Scalar):
            chosen = [member for member in chosen if node.text in get_args(member)] or chosen
        if chosen and (len(members) == 1 or not isinstance(node, Mapping)):
            before = len(self.faults)
            found = self.value(chosen[0], node, path)
            if found is not FAILED or len(members) == 1 or isinstance(node, Sequence) or len(self.faults) > before + 1:
                return found
            last = self.faults.pop()
            wanted, full = f"must be {describe(chosen[0])}", f"must be {describe(annotation)}"
            self.faults.append(Fault(last.where, last.reason.replace(wanted, full)))
            return FAILED
        return self.fault(node, path, f"must be {describe(annotation)}, not {_kind(node)}")

    def scalar(self, annotation: Any, node: Scalar, path: str) -> object:
        """A true or false, number, text, path or choice from a scalar's text."""
        text = node.text
        shown = escape(text) or "empty text"
        if get_origin(annotation) is Literal:
            if text in get_args(annotation):
                return text
            near = nearest(text, list(get_args(annotation)))
            return self.fault(
                node, path, f"must be {describe(annotation)}, not {shown}" + (f"; did you mean {near}?" if near else "")
            )
        if annotation in (str, Path):
            if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
                return self.fault(node, path, "holds a character that no text may hold (NUL or half a surrogate pair)")
            return annotation(text)
        if annotation is bool and text.lower() in WORDS:
            return WORDS[text.lower()]
        if annotation in (int, float) and NOT_FINITE.fullmatch(text):
            return self.fault(node, path, f"must be a finite number, not {shown}")
        if annotation is int and INTEGER.fullmatch(text):
            return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
        if annotation in (int, float) and NUMBER.fullmatch(text):
            number = float(text)
            if not math.isfinite(number):
                return self.fault(node, path, f"must be a finite number, not {shown}")
            if annotation is float:
                return number
            if number.is_integer() and abs(number) < 2**53:
                return int(number)
        return self.fault(node, path, f"must be {describe(annotation)}, not {shown}")


def _kind(node: Node) -> str:
    if isinstance(node, Scalar):
        return "empty" if node.is_null else escape(node.text)
    return f"a list of {len(node.items)}" if isinstance(node, Sequence) else "a section of keys"

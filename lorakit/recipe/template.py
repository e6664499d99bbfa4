"""A commented recipe to start from, written from the schema itself: its fields, docstrings and defaults."""

import inspect
import textwrap
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from lorakit.recipe.build import nested_section, section_of
from lorakit.recipe.load import scalar
from lorakit.recipe.schema import LlamaRecipe, SDRecipe, Section

HEADS = {
    SDRecipe: ("Stable Diffusion", "train-sd", "path/to/your/pictures"),
    LlamaRecipe: ("LLaMA", "train-llama", "path/to/your/chats.jsonl"),
}
WIDTH = 100


def template(kind: type[SDRecipe] | type[LlamaRecipe]) -> str:
    """A recipe that loads: base and data, marked EDIT, as builtin: model and placeholder, all else at its default,
    explained."""
    family, command, placeholder = HEADS[kind]
    lines = [
        f"# A recipe to train a LoRA for {family}.",
        "# Edit the lines marked EDIT. All else shows its default; a key with a # in front is not set.",
        f"# Then: lorakit {command} THIS_FILE --dry-run, and without --dry-run to train.",
    ]
    for name, field in kind.model_fields.items():
        cls = section_of(field.annotation)
        assert cls is not None
        lines += ["", *_comment(_about(cls)), f"{name}:"]
        lines += [f"  {line}".rstrip() for line in _section(cls, placeholder)]
    return "".join(f"{line}\n" for line in lines)


def explanation(cls: type[Section], name: str) -> str:
    """The docstring of a field, its own or that of the section it comes from."""
    for ancestor in cls.__mro__:
        if issubclass(ancestor, Section) and name in ancestor.model_fields:
            text = ancestor.model_fields[name].description
            if text:
                return " ".join(text.replace("``", "").split())
    return ""


def _about(cls: type[Section]) -> str:
    """The docstring of a section, its own or an ancestor's."""
    for ancestor in cls.__mro__:
        if ancestor is not Section and issubclass(ancestor, Section) and ancestor.__doc__:
            return " ".join(inspect.cleandoc(ancestor.__doc__).split())
    return ""


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, WIDTH)]


def _choices(annotation: Any) -> str:
    """`` One of: ...`` for a field of fixed words, `` Any of: ...`` for a list of them."""
    if get_origin(annotation) is UnionType:
        return "".join(map(_choices, get_args(annotation)))
    many = get_origin(annotation) is list
    literal = get_args(annotation)[0] if many else annotation
    if get_origin(literal) is not Literal:
        return ""
    return f" {'Any' if many else 'One'} of: {', '.join(get_args(literal))}."


def _section(cls: type[Section], placeholder: str) -> Iterator[str]:
    for name, field in cls.model_fields.items():
        yield from _comment(explanation(cls, name) + _choices(field.annotation))
        item = nested_section(field.annotation)
        if field.is_required() and item is not None:
            yield f"{name}:"
            lines = list(_section(item, placeholder))
            first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
            yield from (f"  {line}" for line in lines[:first])
            yield f"  - {lines[first]}"
            yield from (f"    {line}" for line in lines[first + 1 :])
        elif field.is_required():
            yield f"{name}: {scalar(placeholder)}  # EDIT"
        elif field.default is None:
            yield f"# {name}:"
        else:
            default = field.get_default(call_default_factory=True)
            edit = "  # EDIT" if name == "model" else ""
            yield f"{name}: {scalar(_plain(default))}{edit}"


def _plain(value: object) -> object:
    """A default as YAML holds it: a tuple as a list, a path as text."""
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, str | int | float | list | dict) else str(value)

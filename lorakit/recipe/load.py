"""A YAML file and ``--set`` overrides -> a frozen recipe, with every fault at once; and a recipe -> YAML.

Nothing here imports torch, opens a model or touches the network. ``${NAME}`` stays as written: recipes do not read the
environment. Paths stay relative to the folder where the command runs.
"""

import errno
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from lorakit.errors import RecipeError
from lorakit.paths import lies_in
from lorakit.recipe import document
from lorakit.recipe.build import build
from lorakit.recipe.document import HINT, Fault, Mapping, Node, Scalar, compose, escape, raise_faults
from lorakit.recipe.schema import LlamaRecipe, SDRecipe

R = TypeVar("R", SDRecipe, LlamaRecipe)
PLAIN = re.compile(r"(\.{0,2}/)?[A-Za-z_]([A-Za-z0-9_./-]|:(?=[A-Za-z0-9]))*")
OTHER_FAMILY: dict[type, str] = {
    SDRecipe: "data.train is LLaMA's: if this is a recipe for LLaMA, `lorakit train-llama` trains it",
    LlamaRecipe: "data.path is Stable Diffusion's: if this is a recipe for it, `lorakit train-sd` trains it",
}
WORDS_ELSEWHERE = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def load(path: Path, kind: type[R], overrides: Sequence[str] = ()) -> R:
    """The recipe in the file ``path``, after ``overrides`` (``section.key=value``, value in YAML).

    Raises RecipeError with every fault found, each as ``FILE:LINE:COL FIELD: reason`` or ``--set FIELD: reason``.
    """
    root, faults = _tree(path, overrides)
    return _finish(path, kind, root, faults)


def load_any(path: Path, overrides: Sequence[str] = ()) -> SDRecipe | LlamaRecipe:
    """The recipe in the file ``path``, of the family that its ``data`` section belongs to."""
    root, faults = _tree(path, overrides)
    family = _family(root)
    if family is None:
        place = root.items["data"].where if "data" in root.items else root.where
        reason = "must hold either path (Stable Diffusion) or train (LLaMA)"
        raise_faults([*faults, Fault(f"{place} data", reason)])
    if family is LlamaRecipe:
        return _finish(path, LlamaRecipe, root, faults)
    return _finish(path, SDRecipe, root, faults)


def as_dict(recipe: SDRecipe | LlamaRecipe) -> dict[str, Any]:
    """The recipe as JSON can hold it, every default included."""
    return recipe.model_dump(mode="json")


def dump(recipe: SDRecipe | LlamaRecipe) -> str:
    """YAML with every default written out; ``load`` reads an equal recipe from it."""
    return "".join(line + "\n" for line in _lines(as_dict(recipe)))


def _lines(mapping: dict[str, Any]) -> Iterator[str]:
    for key, value in mapping.items():
        name = plain_or_quoted(key)
        if isinstance(value, dict) and value:
            yield f"{name}:"
            yield from (f"  {line}" for line in _lines(value))
        elif isinstance(value, list) and any(isinstance(item, str | dict) for item in value):
            yield f"{name}:"
            for item in value:
                first, *rest = list(_lines(item)) if isinstance(item, dict) else [scalar(item)]
                yield f"  - {first}"
                yield from (f"    {line}" for line in rest)
        else:
            yield f"{name}: {scalar(value)}"


def scalar(value: object) -> str:
    """One value as YAML 1.1 and 1.2 readers alike understand it; an empty list or mapping too."""
    if isinstance(value, str):
        return plain_or_quoted(value)
    if isinstance(value, float):
        mantissa, mark, exponent = repr(value).partition("e")
        return mantissa + (".0" if mark and "." not in mantissa else "") + mark + exponent
    return json.dumps(value)


def plain_or_quoted(text: str) -> str:
    """``text`` without quotes where no YAML reader takes it for anything else, else in double quotes."""
    if PLAIN.fullmatch(text) and text.lower() not in WORDS_ELSEWHERE:
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in quoted)


def _tree(path: Path, overrides: Sequence[str]) -> tuple[Mapping, list[Fault]]:
    """The file's tree with the overrides put in, and the faults found so far."""
    faults: list[Fault] = []
    source = escape(str(path), 300)
    root = compose(document.read(path), source, faults)
    if root is None:
        raise RecipeError("is empty", where=source, hint=HINT)
    if not isinstance(root, Mapping):
        kind = "a single value" if isinstance(root, Scalar) else "a list"
        raise RecipeError(f"must hold sections such as base and data, not {kind}", where=root.where, hint=HINT)
    for override in overrides:
        root = _override(root, override, faults)
    return root, faults


def _override(root: Mapping, override: str, faults: list[Fault]) -> Mapping:
    """``root`` with one ``section.key=value`` put in; what is on the way there is copied, aliases stay as they were."""
    field, equals, text = override.partition("=")
    field = field.strip()
    if not equals or not all(field.split(".")):
        faults.append(Fault(f"--set {escape(override)}", "must be SECTION.KEY=VALUE, such as train.steps=50"))
        return root
    found: list[Fault] = []
    try:
        value = compose(text, "--set", found)
    except RecipeError as error:
        faults.append(Fault(f"--set {escape(field)}", f"the value is {error.reason}"))
        return root
    faults += [Fault(f"--set {escape(field)}", fault.reason) for fault in found]
    *parents, last = field.split(".")
    root = replace(root, items=dict(root.items), key_where=dict(root.key_where))
    node: Node = root
    for number, part in enumerate(parents):
        inner = _child(node, part)
        if inner is None or (isinstance(inner, Scalar) and inner.is_null):
            inner = Mapping("--set")
        if isinstance(inner, Mapping):
            inner = replace(inner, items=dict(inner.items), key_where=dict(inner.key_where))
        elif isinstance(inner, document.Sequence):
            inner = replace(inner, items=list(inner.items))
        if not _put(node, part, inner):
            faults.append(Fault(f"--set {escape(field)}", f"{_where_not(parents[:number], part, node)}"))
            return root
        node = inner
    if not _put(node, last, value or Scalar("--set", "", True)):
        faults.append(Fault(f"--set {escape(field)}", _where_not(parents, last, node)))
    return root


def _child(node: Node, part: str) -> Node | None:
    if isinstance(node, Mapping):
        return node.items.get(part)
    if isinstance(node, document.Sequence) and part.isdecimal() and len(part) < 9 and int(part) < len(node.items):
        return node.items[int(part)]
    return None


def _put(node: Node, part: str, value: Node) -> bool:
    """Set or add ``part`` of ``node``; False when there is no such place."""
    if isinstance(node, Mapping):
        node.items[part] = value
        node.key_where[part] = "--set"
        return True
    if isinstance(node, document.Sequence) and part.isdecimal() and len(part) < 9 and int(part) <= len(node.items):
        node.items[int(part) : int(part) + 1] = [value]
        return True
    return False


def _where_not(parents: list[str], part: str, node: Node) -> str:
    above = escape(".".join(parents))
    if isinstance(node, document.Sequence):
        return f"{above} is a list of {len(node.items)}, counted from 0; there is no {escape(part)}"
    return f"{above} is a single value and has no {escape(part)}"


def _family(root: Mapping) -> type[SDRecipe] | type[LlamaRecipe] | None:
    """The family whose required key stands in the data section; None when neither does, or both."""
    data = root.items.get("data")
    keys = data.items if isinstance(data, Mapping) else {}
    if ("train" in keys) == ("path" in keys):
        return None
    return LlamaRecipe if "train" in keys else SDRecipe


def _finish(path: Path, kind: type[R], root: Mapping, faults: list[Fault]) -> R:
    recipe = build(kind, root, faults)
    if recipe is not None:
        source = escape(str(path), 300)
        faults += _quantization_faults(recipe, root, source)
        faults += _folder_faults(recipe, root, source)
    family = _family(root)
    raise_faults(faults, HINT if family in (None, kind) else OTHER_FAMILY[kind])
    assert recipe is not None
    return recipe


def _quantization_faults(recipe: SDRecipe | LlamaRecipe, root: Mapping, source: str) -> Iterator[Fault]:
    """int8 with DoRA: bitsandbytes 0.50's int8 layers under PEFT 0.21's DoRA fail in their second forward pass too."""
    if isinstance(recipe, LlamaRecipe) and recipe.base.quantization == "int8" and recipe.adapter.dora:
        yield Fault(_place(root, "base.quantization", source), "int8 and adapter.dora do not go together; nf4 does")


def _folder_faults(recipe: SDRecipe | LlamaRecipe, root: Mapping, source: str) -> Iterator[Fault]:
    """The run folder inside the base's or the data's folder, and paths that are symlink loops."""
    run = recipe.output.folder / recipe.output.name
    named = {"base.model": recipe.base.model}
    if isinstance(recipe, SDRecipe):
        named["data.path"] = recipe.data.path
    else:
        named |= {f"data.train.{i}.path": s.path for i, s in enumerate(recipe.data.train)}
        if isinstance(recipe.data.held_out, list):
            named |= {f"data.held_out.{i}.path": s.path for i, s in enumerate(recipe.data.held_out)}
    # Bases and data may start with ~; of the run folder it is expanded already.
    named = {field: os.path.expanduser(text) for field, text in named.items()} | {"output.folder": str(run)}
    loops = {field: loop for field, text in named.items() if (loop := _loop(Path(text)))}
    for field, loop in loops.items():
        yield Fault(_place(root, field, source), f"{escape(str(loop))} is a symbolic link that leads to itself")
    for field, text in named.items():
        sound = field != "output.folder" and not {field, "output.folder"} & loops.keys() and os.path.exists(text)
        if sound and lies_in(run, text):
            reason = f"the run folder {escape(str(run))} would be inside {field} ({escape(text)})"
            yield Fault(_place(root, "output.folder", source), f"{reason}; choose another output.folder")


def _loop(path: Path) -> Path | None:
    """The part of ``path`` that is a loop of symbolic links, if any."""
    for part in [*reversed(path.parents), path]:
        try:
            os.stat(part)
        except OSError as error:
            if error.errno == errno.ELOOP:
                return part
    return None


def _place(root: Mapping, field: str, source: str) -> str:
    """``FILE:LINE:COL FIELD`` of a field, or ``FILE FIELD`` when it stands at its default."""
    node: Node | None = root
    for part in field.split("."):
        node = _child(node, part) if node is not None else None
    return f"{node.where if node is not None else source} {field}"

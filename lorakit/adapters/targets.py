"""Which layers get LoRA, and with which rank and alpha: names and patterns against a model's outline."""

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple

from torch import nn

from lorakit.adapters.delta import Delta
from lorakit.adapters.formats import bare
from lorakit.adapters.outline import Outline, adaptable, kernel_of, sizes
from lorakit.errors import ModelError, RecipeError
from lorakit.recipe.schema import Adapter, LlamaAdapter


class Target(NamedTuple):
    """A layer that gets LoRA: its module path, features in and out (channels of a convolution), and rank."""

    name: str
    inputs: int
    outputs: int
    rank: int


@dataclass(frozen=True)
class Injection:
    """What was put where: the recipe's section, the targets in the model's order, and their alphas by name."""

    adapter: Adapter
    targets: tuple[Target, ...]
    alphas: dict[str, float]
    suffixes: tuple[str, ...]
    """Ends of module paths that pick out exactly the targets; their full paths where no ends do."""

    def scale(self, target: Target) -> float:
        """alpha / r, or alpha / sqrt(r) with rslora."""
        return self.alphas[target.name] / (math.sqrt(target.rank) if self.adapter.rslora else target.rank)


def matches(name: str, pattern: str) -> bool:
    """Whether a module path, or the end of it after a dot, is what the shell-style pattern says."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def near(pattern: str, names: Sequence[str]) -> str:
    """A hint: the names most like ``pattern``, by their last one and two parts."""
    ends = sorted({".".join(name.split(".")[-count:]) for name in names for count in (1, 2)})
    near = get_close_matches(pattern, ends, n=4, cutoff=0.5) or sorted({name.split(".")[-1] for name in names})[:8]
    return f"near names: {', '.join(near)}"


def _none(field: str, pattern: str, names: Sequence[str]) -> RecipeError:
    return RecipeError(f"{pattern!r} matches no layer of the model", where=field, hint=near(pattern, names))


def _select(outline: Outline, adapter: Adapter, groups: Mapping[str, Sequence[str]]) -> list[str]:
    layers = outline.layers
    if adapter.targets == "all-linear":
        chosen = [name for name, layer in layers.items() if not layer.kernel and not layer.head]
    else:
        if isinstance(adapter.targets, str) and adapter.targets not in groups:
            raise RecipeError(f"{adapter.targets!r} is not known for this model", where="adapter.targets")
        patterns = groups[adapter.targets] if isinstance(adapter.targets, str) else adapter.targets
        for pattern in patterns:
            if not any(matches(name, pattern) for name in layers):
                raise _none("adapter.targets", pattern, list(layers))
        chosen = [name for name in layers if any(matches(name, pattern) for pattern in patterns)]
    numbers = _layers(adapter)
    return chosen if numbers is None else _in_layers(chosen, numbers)


def _layers(adapter: Adapter) -> list[int] | None:
    """``layers``, which only a LLaMA recipe has."""
    return adapter.layers if isinstance(adapter, LlamaAdapter) else None


def _in_layers(names: Sequence[str], layers: Sequence[int]) -> list[str]:
    numbers = {name: int(m[1]) for name in names if (m := re.search(r"(?:^|\.)layers\.(\d+)\.", name))}
    for wanted in layers:
        if wanted not in numbers.values():
            there = f"has {max(numbers.values()) + 1}" if numbers else "does not number its layers"
            raise RecipeError(f"layer {wanted}: the model {there}", where="adapter.layers", hint="counted from 0")
    return [name for name in names if name in numbers and numbers[name] in layers]


def _by_pattern(field: str, table: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The first matching pattern's value by name; RecipeError for a pattern that matches none of ``names``."""
    for pattern in table:
        if not any(matches(name, pattern) for name in names):
            raise _none(field, pattern, names)
    return {
        name: next(value for pattern, value in table.items() if matches(name, pattern))
        for name in names
        if any(matches(name, pattern) for pattern in table)
    }


def injection(outline: Outline, adapter: Adapter, groups: Mapping[str, Sequence[str]]) -> Injection:
    """The recipe's section worked out against a model. RecipeError as ``inject`` says."""
    names = _select(outline, adapter, groups)
    if not names:
        field = "adapter.targets" if _layers(adapter) is None else "adapter.layers"
        raise RecipeError("no layer of the model is left to train", where=field)
    ranks = _by_pattern("adapter.rank_pattern", adapter.rank_pattern, names)
    alphas = _by_pattern("adapter.alpha_pattern", adapter.alpha_pattern, names)
    targets = []
    for name in names:
        layer = outline.layers[name]
        target = Target(name, layer.inputs, layer.outputs, rank=int(ranks.get(name, adapter.rank)))
        most = min(target.inputs * math.prod(layer.kernel), target.outputs)
        if target.rank > most:
            field = "adapter.rank_pattern" if name in ranks else "adapter.rank"
            reason = f"rank {target.rank} is more than a change of {name} can have, {most}"
            raise RecipeError(
                reason, where=field, hint=f"adapter.rank_pattern can give it a rank of its own, {most} or less"
            )
        if layer.shared:
            raise RecipeError(f"{name} shares its weight with another layer", where="adapter.targets")
        targets.append(target)
    alphas = {name: alphas.get(name, adapter.lora_alpha) for name in names}
    return Injection(adapter, tuple(targets), alphas, suffixes(outline.modules, names))


def suffixes(modules: Iterable[str], names: Sequence[str]) -> tuple[str, ...]:
    """Ends of the paths of all ``modules`` that pick out exactly ``names``; the full paths where no ends do."""
    ends = {m[0] for name in names if (m := re.search(r"[^.]+(\.\d+)*$", name))}
    picked = {name for name in modules if name in ends or name.endswith(tuple(f".{end}" for end in ends))}
    return tuple(sorted(ends)) if picked == set(names) else tuple(names)


def fit(model: nn.Module, deltas: Mapping[str, Delta]) -> dict[str, str]:
    """The model's own path for each of an adapter's, which may have CLIP's old ``text_model.`` in front or lack it.

    Raises ModelError naming the module that is missing, or whose shape differs. ``model`` may be on meta.
    """
    paths, wrong = compare(model, deltas)
    for key, reason in wrong.items():
        names = list({**_embeddings(model), **adaptable(model)})
        raise ModelError(reason, where=key, hint=near(key, names) if reason == MISSING else "")
    return paths


MISSING = "the base has no such module"


def compare(model: nn.Module, deltas: Mapping[str, Delta]) -> tuple[dict[str, str], dict[str, str]]:
    """``fit``'s paths of all changes that fit, and why each of the others does not."""
    layers = {**_embeddings(model), **adaptable(model)}
    named = {bare(name): name for name in layers}
    paths, wrong = {}, {}
    for key, delta in deltas.items():
        path = named.get(bare(key))
        if path is None:
            wrong[key] = MISSING
            continue
        shape = (*reversed(sizes(layers[path])), *kernel_of(layers[path]))
        if delta.shape == shape:
            paths[key] = path
        else:
            wrong[key] = f"the adapter is for a weight {delta.shape}, the base has {shape}"
    return paths, wrong


def _embeddings(model: nn.Module) -> dict[str, nn.Embedding]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}

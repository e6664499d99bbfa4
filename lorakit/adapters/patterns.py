"""The regular expressions in a PEFT configuration, which come with the adapter: bounded in time.

Python's own ``re`` would try some of them for years (``(a|a)*b``); ``regex`` gives up when told to.
"""

import math
from collections.abc import Mapping
from typing import Any

import regex

from lorakit.errors import ModelError

LARGEST = 2**31
"""Of ranks and alphas: more is taken for a broken number."""
SECONDS = 0.1
"""For one expression on one module's path, where a plain one takes microseconds."""


def fits(pattern: str, path: str, where: str) -> bool:
    """Whether the whole of ``path`` is what the expression says. ModelError when it is none, or never ends."""
    try:
        return regex.fullmatch(pattern, path, timeout=SECONDS) is not None
    except TimeoutError as error:
        reason = f"a regular expression that takes too long: {pattern[:60]!r}"
        raise ModelError(reason, where=where) from error
    except (regex.error, TypeError, RecursionError, MemoryError) as error:
        raise ModelError(f"not a regular expression: {str(pattern)[:60]!r}", where=where) from error


def number(config: Mapping[str, Any], field: str, path: str, where: str) -> float:
    """``r`` or ``lora_alpha`` of a module: its pattern's, or the general one. ModelError when a rank is not
    above 0, or an alpha is 0."""
    name, wanted = ("rank_pattern", "a positive number") if field == "r" else ("alpha_pattern", "a number other than 0")
    table = config.get(name) or {}
    if not isinstance(table, dict):
        raise ModelError(f"{name} is not a table", where=where)
    value = config.get(field)
    for pattern, own in table.items():
        if fits(rf"(.*\.)?({pattern})", path, where):
            field, value = f"{name} {pattern!r}", own
            break
    size = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not 0 < (size if name == "rank_pattern" else abs(size)) < LARGEST:
        raise ModelError(f"{field} is {str(value)[:40]!r}, not {wanted}", where=where)
    return float(size)


def targeted(targets: object, path: str, where: str) -> bool:
    """Whether PEFT's ``target_modules`` picks a module: an expression for the whole path, or ends of paths."""
    if isinstance(targets, str):
        return targets != "all-linear" and fits(targets, path, where)
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ModelError("target_modules is neither text nor a list of names", where=where)
    return path in targets or path.endswith(tuple(f".{target}" for target in targets))

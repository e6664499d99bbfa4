"""Where a merged model may go."""

import os
import shutil

from lorakit.adapters.merging.plan import MergePlan
from lorakit.errors import ConflictError, ResourceError

SPARE = 50_000_000
"""Bytes that the disk must have left for configs, tokenizer and receipt."""


def check_out(plan: MergePlan, overwrite: bool) -> None:
    """Raises ConflictError when OUT is, holds or is inside an input, or exists and may not be replaced."""
    out, target = plan.out, plan.out.resolve()
    inputs = [("base", plan.base.path), *(("adapter", adapter.path) for adapter in plan.adapters)]
    for name, path in ((name, path.resolve()) for name, path in inputs):
        if target == path or target in path.parents or path in target.parents:
            raise ConflictError(f"OUT is the {name}, lies inside it or contains it", where=str(out))
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise ConflictError("exists already", where=str(out), hint="choose another name, or --overwrite")
    kinds = ("config.json", "model_index.json")
    if "" in plan.files:
        if out.is_symlink() or not out.is_file():
            raise ConflictError("not a file: it is not replaced", where=str(out))
    elif out.is_symlink() or not out.is_dir() or (any(out.iterdir()) and not any((out / k).is_file() for k in kinds)):
        raise ConflictError("not a model's folder: it is not replaced", where=str(out))


def check_space(plan: MergePlan) -> int:
    """Bytes that are free where OUT goes. ResourceError when the merged model takes more."""
    parent = next(path for path in plan.out.resolve().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < plan.size + SPARE:
        needed = plan.size + SPARE
        reason = f"the merged model takes {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free"
        raise ResourceError(reason, where=str(parent), hint="free some space, or write elsewhere")
    return free

"""Where a merged model may go."""

import os

from lorakit.adapters.merging.plan import MergePlan
from lorakit.adapters.merging.receipt import receipt_path
from lorakit.errors import ConflictError, ResourceError
from lorakit.paths import check_apart, free_bytes, standing
from lorakit.storage.disk import check_name, check_takes_files

SPARE = 50_000_000
"""Bytes that the disk must have left for configs, tokenizer and receipt."""


def check_out(plan: MergePlan, overwrite: bool) -> None:
    """Raises ConflictError when OUT is, holds or is inside an input, or exists and may not be replaced."""
    out, single = plan.out, "" in plan.files
    check_apart(out, [("base", plan.base.path), *(("adapter", adapter.path) for adapter in plan.adapters)])
    beside = receipt_path(out)
    for path in (out, beside):
        check_name(path)
    for path in (out, beside) if single else (out,):
        if not overwrite and os.path.lexists(path):
            raise ConflictError("exists already", where=str(path), hint="choose another name, or --overwrite")
    if not os.path.lexists(out):
        return
    kinds = ("config.json", "model_index.json")
    if single:
        if out.is_symlink() or not out.is_file():
            raise ConflictError("not a file: it is not replaced", where=str(out))
    elif out.is_symlink() or not out.is_dir() or (any(out.iterdir()) and not any((out / k).is_file() for k in kinds)):
        raise ConflictError("not a model's folder: it is not replaced", where=str(out))


def check_space(plan: MergePlan) -> int | None:
    """Bytes that are free where OUT goes, if the disk says so.

    ResourceError when the merged model takes more, or nothing can be written there.
    """
    folder = plan.out.resolve().parent
    if not standing(folder).is_dir():
        raise ConflictError("a file, where a folder is needed", where=str(standing(folder)))
    check_takes_files(standing(folder))
    free, needed = free_bytes(folder), plan.size + SPARE
    if free is not None and free < needed:
        reason = f"the merged model takes {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free"
        raise ResourceError(reason, where=str(folder), hint="free some space, or write elsewhere")
    return free

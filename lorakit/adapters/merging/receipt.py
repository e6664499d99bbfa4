"""merge_receipt.json: what went into a merged model, what came out, with the SHA-256 of every file."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorakit import __version__
from lorakit.adapters.merging.plan import MergePlan, PlannedAdapter
from lorakit.storage.bases import BaseLocation, digest, file_digest, split_base_id, weight_files
from lorakit.storage.manifest import sha256

NAME = "merge_receipt.json"


def receipt_path(out: Path) -> Path:
    """In a merged folder, or beside a merged file."""
    return out.with_name(f"{out.stem}.{NAME}") if out.suffix == ".safetensors" else out / NAME


def trained_on(adapter: PlannedAdapter, base: BaseLocation) -> bool | None:
    """Whether an adapter was trained on this very base, by the SHA-256 it records; None when it records none.

    The base's weights are read, unless they have been before.
    """
    _, recorded = split_base_id(adapter.trained_on)
    return recorded == digest(base) if recorded else None


def other_base(adapter: PlannedAdapter, base: BaseLocation) -> str:
    """A warning for an adapter that was trained on another base; empty for one that was not, or does not say."""
    if trained_on(adapter, base) is not False:
        return ""
    name, _ = split_base_id(adapter.trained_on)
    same = "an earlier state of it, or another precision or file layout" if name == base.name else name
    return (
        f"{adapter.path} was not trained on these weights of {base.name}, but on {same}: name that as BASE if you can"
    )


def receipt(plan: MergePlan, place: Path, written: Mapping[str, str], outcome: Mapping[str, Any]) -> str:
    """The JSON text. ``written`` has the SHA-256 of the weight files by path; ``outcome`` comes last."""
    table = {
        "lorakit": __version__,
        "base": {"name": plan.base.name, "sha256": digest(plan.base), "files": dict(_base_files(plan.base))},
        "adapters": [
            {
                "path": str(adapter.path),
                "weight": adapter.weight,
                "trained_on": adapter.trained_on or None,
                "is_its_base": trained_on(adapter, plan.base),
                "files": {
                    path.relative_to(adapter.path.parent).as_posix(): file_digest(path).hex() for path in adapter.files
                },
            }
            for adapter in plan.adapters
        ],
        "out": dict(_out_files(plan, place, written)),
        **outcome,
    }
    return json.dumps(table, indent=2) + "\n"


def _base_files(base: BaseLocation) -> Iterator[tuple[str, str]]:
    root = base.path if base.path.is_dir() else base.path.parent
    for path in weight_files(base):
        yield path.relative_to(root).as_posix(), file_digest(path).hex()


def _out_files(plan: MergePlan, place: Path, written: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    if "" in plan.files:
        yield plan.out.name, written[""]
        return
    for path in sorted(path for path in place.rglob("*") if path.is_file()):
        name = path.relative_to(place).as_posix()
        yield name, written[name] if name in written else sha256(path)

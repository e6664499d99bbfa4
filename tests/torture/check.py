"""What a killed run may leave behind, and what a resumed one must come to: beside straight runs, byte for byte."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

COUNTED = ("step", "loss", "learning_rate", "grad_norm", "held_out_loss", "perplexity")
"""What metrics.jsonl says of the training itself; the rest are times."""
STATE = (
    "step", "examples", "count", "first_held_out", "last_held_out", "data_hash", "base_id", "base_texts"
)  # fmt: skip
TENSORS = ("adapter.safetensors", "optimizer.safetensors")


@dataclass(frozen=True)
class Reference:
    """Two runs that were never stopped: ``straight`` by the recipe, ``every`` with each step's checkpoint kept."""

    straight: Path
    every: Path


def steps(run: Path) -> list[int]:
    """The steps that have a checkpoint."""
    return sorted(int(folder.name[5:]) for folder in (run / "checkpoints").glob("step-*"))


def rows(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, without times."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k in COUNTED} for line in lines]


def broken(run: Path, reference: Reference) -> list[str]:
    """What is not whole in a run folder at any time (invariant D): nothing half-written but ``.tmp-*``."""
    if not run.is_dir():
        return []
    faults = []
    known = {p.name for p in reference.straight.iterdir()} | {".lock"}
    for path in run.iterdir():
        if path.name not in known and not path.name.startswith(".tmp-"):
            faults.append(f"{path.name} does not belong here")
    for name in ("recipe.yaml", "data.json"):
        if (run / name).exists() and (run / name).read_bytes() != (reference.straight / name).read_bytes():
            faults.append(f"{name} is not whole")
    if (have := rows(run)) != rows(reference.straight)[: len(have)]:
        faults.append("metrics.jsonl is not a beginning of the straight run's")
    for step in steps(run):
        faults += checkpoint_faults(run, reference, step)
    for name in ("adapter", "samples/step-000000", "samples/step-000008"):
        if (run / name).exists():
            faults += [f"{name}/{f}" for f in differing_files(run / name, reference.straight / name)]
    if (run / "run.safetensors").exists():
        faults += _differing_tensors(run / "run.safetensors", reference.straight / "run.safetensors")
    if (run / "loss.png").exists():
        with Image.open(run / "loss.png") as picture:
            picture.load()
    return faults


def divergent(run: Path, reference: Reference) -> list[str]:
    """What differs in a finished run from the straight one; the best is an empty list."""
    faults = broken(run, reference)
    if rows(run) != rows(reference.straight):
        faults.append("metrics.jsonl differs")
    if steps(run)[-1:] != steps(reference.straight)[-1:] or len(steps(run)) > 2:
        faults.append(f"checkpoints {steps(run)}")
    have, expected = _names(run), _names(reference.straight)
    faults += [f"{name} is missing or left over" for name in sorted(have ^ expected)]
    return faults


def checkpoint_faults(run: Path, reference: Reference, step: int) -> list[str]:
    """A checkpoint beside the same step of the straight run, and its manifest, read without lorakit."""
    name = f"checkpoints/step-{step:06d}"
    folder, expected = run / name, reference.every / name
    listed = json.loads((folder / "manifest.json").read_bytes())["files"]
    sums = {f: hashlib.sha256((folder / f).read_bytes()).hexdigest() for f in listed}
    faults = [f"{name}/{f} differs from its manifest" for f in listed if listed[f]["sha256"] != sums[f]]
    if sorted(p.name for p in folder.iterdir()) != sorted([*listed, "manifest.json"]):
        faults.append(f"{name} does not hold what its manifest lists")
    if step == 0:  # saved only by a run that was stopped while it measured at first
        return faults
    for file in TENSORS:
        if (folder / file).read_bytes() != (expected / file).read_bytes():
            faults.append(f"{name}/{file} differs from the straight run's")
    state, straight = (json.loads((f / "state.json").read_bytes()) for f in (folder, expected))
    faults += [f"{name}/state.json: {key} differs" for key in STATE if state[key] != straight[key]]
    return faults


def differing_files(folder: Path, expected: Path) -> list[str]:
    """Files of two folders that are not the same: tensors by value, others byte for byte."""
    here, there = ({p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file()} for f in (folder, expected))
    faults = sorted(here ^ there)
    for name in here & there:
        if name.endswith(".safetensors"):
            faults += _differing_tensors(folder / name, expected / name)
        elif (folder / name).read_bytes() != (expected / name).read_bytes():
            faults.append(name)
    return faults


def _differing_tensors(path: Path, expected: Path) -> list[str]:
    one, two = load_file(path), load_file(expected)
    same = one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    return [] if same else [path.name]


def _names(run: Path) -> set[str]:
    """Everything but checkpoints: a run stopped between two keeps the one it made then."""
    names = {path.relative_to(run).as_posix() for path in run.rglob("*")}
    return {name for name in names if not name.startswith("checkpoints/")}

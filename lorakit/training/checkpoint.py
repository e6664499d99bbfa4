"""Checkpoints: all that a run needs to go on exactly where it stopped.

A folder ``step-000200`` holds ``adapter.safetensors``, ``optimizer.safetensors``, ``state.json`` and ``manifest.json``.
There are no files of random-number state: data order, noise and dropout are functions of (seed, step, rank), so the
step says it all.
"""

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from lorakit.errors import CheckpointError
from lorakit.storage import atomic, disk, manifest
from lorakit.storage.runs import RunFolder
from lorakit.training import optim

log = logging.getLogger("lorakit")


@dataclass(frozen=True, kw_only=True)
class State:
    """``state.json``: where the run stands, and what it was started with."""

    base_id: str
    base_texts: Mapping[str, str]
    data_hash: str
    recipe: Mapping[str, Any]
    """The resolved recipe as plain JSON."""
    world: int
    """Ranks that trained it."""
    devices: str
    """What they trained on (``device.name``), each kind once."""
    dtype: str
    """Of the base's weights and the matmuls: what ``compute.precision`` came to."""
    step: int = 0
    """Finished updates."""
    examples: int = 0
    """Examples seen so far."""
    count: int = 0
    """Labelled tokens or images summed over so far."""
    seconds: float = 0.0
    """Training time so far, over all resumes."""
    first_held_out: float | None = None
    last_held_out: float | None = None
    evaluated: int = -1
    """Step of the last held-out loss; -1: none yet."""
    sampled: int = -1
    """Step of the last samples; -1: none yet."""
    scaler: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """fp16's loss scale; empty in other precisions."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back from ``folder``."""

    folder: Path
    state: State
    adapter: Mapping[str, Tensor]


def save(
    run: RunFolder, state: State, adapter: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, *, keep: int
) -> None:
    """Write the checkpoint of ``state.step``, read it back, and only then remove all but the ``keep`` newest.

    A folder of this step can only be one that failed its manifest; it is replaced. ResourceError on a full disk.
    """
    final = run.checkpoint(state.step)
    tensors, meta = optim.state_to_tensors(optimizer)
    if run.metrics.exists():
        with disk.disk_errors(run.metrics):
            disk.fsync(run.metrics)
    with atomic.new_folder(final, manifest=True, replace=True) as folder:
        # By Python, since safetensors' own writer does not hear of a quota that closing the file runs into.
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.items()}
        (folder / "adapter.safetensors").write_bytes(to_bytes(plain))
        (folder / "optimizer.safetensors").write_bytes(to_bytes(tensors, metadata={"optimizer": meta}))
        (folder / "state.json").write_text(json.dumps(dataclasses.asdict(state), indent=1) + "\n", encoding="utf-8")
    manifest.check_manifest(final)
    prune(run, state.step, keep=keep)


def prune(run: RunFolder, newest_good: int, *, keep: int) -> None:
    """Remove all but the ``keep`` newest checkpoints up to the step ``newest_good``, whose manifest held."""
    earlier = [folder for step, folder in run.saved() if step <= newest_good]
    with disk.disk_errors(run.checkpoints):
        for folder in earlier[:-keep]:
            atomic.discard(folder)


def newest(run: RunFolder) -> Checkpoint | None:
    """The newest checkpoint whose manifest holds, with a warning for each newer one that fails.

    None, with a warning, for a run that was stopped before its first one. CheckpointError when all fail.
    """
    folders = run.saved()
    if not folders:
        log.warning("%s: stopped before its first checkpoint; training starts at the first step", run.root)
        return None
    for _, folder in reversed(folders):
        try:
            manifest.check_manifest(folder)
            return _read(folder)
        except CheckpointError as error:
            log.warning("%s; using the checkpoint before it", error)
    hint = "start a new run under another output.name"
    raise CheckpointError("no checkpoint is intact", where=str(run.checkpoints), hint=hint)


def load_optimizer(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer) -> None:
    """Put the checkpoint's optimizer state into ``optimizer``; CheckpointError when it does not fit."""
    path = checkpoint.folder / "optimizer.safetensors"
    with _readable(path), safe_open(path, "pt") as file:
        meta = file.metadata()["optimizer"]
        optim.load_state_tensors(optimizer, {key: file.get_tensor(key) for key in file.keys()}, meta)  # noqa: SIM118


def _read(folder: Path) -> Checkpoint:
    with _readable(folder / "state.json"):
        told = json.loads((folder / "state.json").read_bytes())
    if not isinstance(told, dict) or told.keys() != {field.name for field in dataclasses.fields(State)}:
        raise CheckpointError("written by another version of lorakit, which can go on with it", where=str(folder))
    state = State(**told)
    with _readable(folder / "optimizer.safetensors"), safe_open(folder / "optimizer.safetensors", "pt"):
        pass
    with _readable(folder / "adapter.safetensors"):
        return Checkpoint(folder, state, load_file(folder / "adapter.safetensors"))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """A file that cannot be understood is a CheckpointError that names it; one that cannot be read a ResourceError."""
    try:
        with disk.read_errors(path):
            yield
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(path)) from error
